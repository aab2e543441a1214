"""The quality-speed picture, as SVG for a page and PNG for a slide; the only place that knows matplotlib."""

from __future__ import annotations

import io
from typing import Any

from twotower.evaluate.evaluation import AR, DEFAULT, OTHER
from twotower.extras import require_libraries

__all__ = ["draw_curve", "require_charts"]

_COLOURS = ("#3b6fb6", "#c2571a", "#3f8f5b", "#8a5aa8", "#7a7a2a", "#a03c5a")  # told apart without red against green
_INK, _FAINT = "#26303c", "#8b95a1"
_FAR = 1.6  # from this speedup on the baseline stands in a panel of its own


def require_charts() -> None:
    """Says before an hour of measuring what would be missing at its end.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_libraries("evaluate", "matplotlib", what="a report with a picture")


def draw_curve(report: dict[str, Any]) -> tuple[str, bytes]:
    """Retention against speed, one line for each limit of steps: the curve as SVG text and as PNG."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # The figure itself draws: pyplot would look for a screen and keep every figure alive.
    with rc_context({"svg.hashsalt": "twotower", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(9.2, 4.6), layout="constrained")
        baseline, curve = _panels(figure, report)
        _draw_baseline(baseline)
        _draw_curve(curve, report)
        _frame(figure, baseline, curve)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()


def _panels(figure: Any, report: dict[str, Any]) -> tuple[Any, Any]:
    """Axes of the baseline and of the curve: one and the same, unless the curve is so far away that it would shrink to a stroke."""
    speeds = [s["total"]["speedup"]["value"] for name, s in report["settings"].items() if name != AR]
    if min((x for x in speeds if x is not None), default=1.0) < _FAR:
        axes = figure.add_subplot()
        return axes, axes
    baseline, curve = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (1, 8)})
    baseline.set_xlim(0.9, 1.1)
    baseline.set_xticks([1.0])
    curve.tick_params(left=False)
    curve.spines["left"].set_linestyle((0, (2, 4)))  # the axis is broken here
    return baseline, curve


def _draw_baseline(axes: Any) -> None:
    axes.plot([1], [100], "s", color=_INK, markersize=7, label="autoregression")
    axes.axvline(1, color=_FAINT, linewidth=0.8)


def _draw_curve(axes: Any, report: dict[str, Any]) -> None:
    settings = report["settings"]
    sweep: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for name, setting in settings.items():
        if name not in (AR, DEFAULT, OTHER):
            sweep.setdefault(setting["config"]["steps_per_block"], []).append((setting["config"]["confidence_threshold"], setting["total"]))
    for colour, (steps, points) in zip(_COLOURS * len(sweep), sorted(sweep.items()), strict=False):
        points.sort(key=lambda point: point[0])
        x, y = [p["speedup"]["value"] for _, p in points], [p["retention"]["value"] for _, p in points]
        axes.plot(x, y, "-o", color=colour, markersize=4, linewidth=1.5, label=f"at most {steps} passes a block")
        if steps != max(sweep):
            continue  # thresholds stand at one line only: the lines lie close together
        for (threshold, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{threshold:g}", (a, b), xytext=(5, 5), textcoords="offset points", fontsize=8, color=colour)
    for name, marker, label in ((DEFAULT, "*", "default preset"), (OTHER, "D", "other bundle")):
        if name in settings:
            _mark(axes, settings[name]["total"], marker, label)
    if "budget" in report:
        percent = report["budget"]["percent"]
        axes.axhline(percent, color=_FAINT, linewidth=0.9, linestyle="--")
        place = {"xytext": (-4, 4), "textcoords": "offset points", "xycoords": ("axes fraction", "data"), "ha": "right"}
        axes.annotate(f"budget {percent:g} %", (1, percent), fontsize=8, color=_FAINT, **place)


def _frame(figure: Any, baseline: Any, curve: Any) -> None:
    both = (baseline,) if baseline is curve else (baseline, curve)
    for axes in both:
        axes.grid(color="#d9dee4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("speed: times the tokens per second of autoregression", fontsize=10)
    baseline.set_ylabel("right answers kept, % of autoregression's")
    handles = dict(zip(*reversed(curve.get_legend_handles_labels()), strict=True)) | dict(
        zip(*reversed(baseline.get_legend_handles_labels()), strict=True)
    )
    curve.legend(handles.values(), handles.keys(), frameon=False, fontsize=8.5, loc="lower left")


def _mark(axes: Any, total: dict[str, Any], marker: str, label: str) -> None:
    x, y = total["speedup"], total["retention"]
    if x["value"] is None or y["value"] is None:
        return
    bars = {"xerr": [[x["value"] - x["low"]], [x["high"] - x["value"]]], "yerr": [[y["value"] - y["low"]], [y["high"] - y["value"]]]}
    size = 13 if marker == "*" else 7
    axes.errorbar(
        [x["value"]], [y["value"]], **bars, fmt=marker, color=_INK, markersize=size, capsize=3, linewidth=1, label=label, zorder=5
    )
