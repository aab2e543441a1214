"""Pictures as SVG for a page and PNG for a slide: quality against speed, what each part costs, ranges of activations."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from twotower.evaluate.evaluation import AR, DEFAULT, OTHER
from twotower.extras import require_libraries
from twotower.spec import CONTEXT, DENOISER

if TYPE_CHECKING:  # calibration needs what an evaluation does not
    from twotower.calibration.statistics import TowerStatistics
    from twotower.calibration.statistics_file import Statistics

__all__ = ["draw_curve", "draw_ranges", "draw_sensitivity", "require_charts"]

_COLOURS = (
    "#3b6fb6",
    "#c2571a",
    "#3f8f5b",
    "#8a5aa8",
    "#7a7a2a",
    "#a03c5a",
)  # told apart without red against green
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
    with rc_context(
        {
            "svg.hashsalt": "twotower",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
        }
    ):
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
    speeds = [
        s["total"]["speedup"]["value"] for name, s in report["settings"].items() if name != AR
    ]
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
            sweep.setdefault(setting["config"]["steps_per_block"], []).append(
                (setting["config"]["confidence_threshold"], setting["total"])
            )
    for colour, (steps, points) in zip(_COLOURS * len(sweep), sorted(sweep.items()), strict=False):
        points.sort(key=lambda point: point[0])
        x, y = (
            [p["speedup"]["value"] for _, p in points],
            [p["retention"]["value"] for _, p in points],
        )
        axes.plot(
            x,
            y,
            "-o",
            color=colour,
            markersize=4,
            linewidth=1.5,
            label=f"at most {steps} passes a block",
        )
        if steps != max(sweep):
            continue  # thresholds stand at one line only: the lines lie close together
        for (threshold, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(
                f"{threshold:g}",
                (a, b),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    for name, marker, label in ((DEFAULT, "*", "default preset"), (OTHER, "D", "other bundle")):
        if name in settings:
            _mark(axes, settings[name]["total"], marker, label)
    if "budget" in report:
        percent = report["budget"]["percent"]
        axes.axhline(percent, color=_FAINT, linewidth=0.9, linestyle="--")
        place = {
            "xytext": (-4, 4),
            "textcoords": "offset points",
            "xycoords": ("axes fraction", "data"),
            "ha": "right",
        }
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
    bars = {
        "xerr": [[x["value"] - x["low"]], [x["high"] - x["value"]]],
        "yerr": [[y["value"] - y["low"]], [y["high"] - y["value"]]],
    }
    size = 13 if marker == "*" else 7
    axes.errorbar(
        [x["value"]],
        [y["value"]],
        **bars,
        fmt=marker,
        color=_INK,
        markersize=size,
        capsize=3,
        linewidth=1,
        label=label,
        zorder=5,
    )


_GOOD, _BAD = "#3b6fb6", "#c2571a"


def draw_sensitivity(report: Mapping[str, Any]) -> tuple[str, bytes]:
    """Quality and passes with one part quantized at a time, with intervals: as SVG text and PNG; needs matplotlib."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = [*report["sensitivity"].items(), ("all together", report["compared"])][::-1]
    budget = report["budget"]
    with rc_context(
        {
            "svg.hashsalt": "twotower",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
        }
    ):
        figure = Figure(figsize=(9.2, 0.8 + 0.42 * len(rows)), layout="constrained")
        kept, passes = figure.subplots(1, 2, sharey=True)
        limits = (
            (kept, "retention", 1.0, 0.0, budget["percent"]),
            (passes, "inflation", 100.0, -100.0, budget["max_inflation"]),
        )
        for axes, name, factor, shift, limit in limits:
            for y, (_, facts) in enumerate(rows):
                value, low, high = (facts[name][k] for k in ("value", "low", "high"))
                if value is None:
                    continue
                x, ends = factor * value + shift, [factor * end + shift for end in (low, high)]
                inside = x >= limit if name == "retention" else x <= limit
                bars = [[x - ends[0]], [ends[1] - x]]
                axes.errorbar(
                    [x],
                    [y],
                    xerr=bars,
                    fmt="o",
                    color=_GOOD if inside else _BAD,
                    markersize=5,
                    capsize=3,
                    linewidth=1.2,
                )
            axes.axvline(limit, color=_FAINT, linewidth=0.9, linestyle="--")
            axes.set_yticks(range(len(rows)), [label for label, _ in rows])
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.grid(axis="x", color="#d9dee4", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        kept.set_xlabel("right answers kept, %")
        passes.set_xlabel("more passes a block, %")
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
        figure.savefig(png, format="png", dpi=150, facecolor="white")
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()


_PANELS = (
    ("in_proj.weight", "Mamba, in"),
    ("out_proj.weight", "Mamba, out"),
    ("qkv_proj.weight", "attention, in"),
    ("o_proj.weight", "attention, out"),
    ("experts.up_proj.weight", "routed experts, in"),
    ("experts.down_proj.weight", "routed experts, hidden"),
    ("shared_experts.up_proj.weight", "shared expert, in"),
    ("shared_experts.down_proj.weight", "shared expert, hidden"),
    ("lm_head.weight", "head, in"),
)
_LINE, _TEXT = "#3b6fb6", "#c2571a"


def draw_ranges(statistics: Statistics) -> dict[str, bytes]:
    """The picture as `ranges.svg` and `ranges.png`; needs matplotlib.

    One panel a kind of input; a thin line a layer, a thick one their median. The leftmost point is
    clean text in the denoiser, which no step of generation ever sees, and the mark beside it the
    context tower on text.
    """
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogFormatter  # noqa: PLC0415

    denoiser, context = statistics.towers[DENOISER], statistics.towers[CONTEXT]
    panels = [(title, _of(denoiser, end), _of(context, end)) for end, title in _PANELS]
    panels = [panel for panel in panels if panel[1]]
    with rc_context(
        {
            "svg.hashsalt": "twotower",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
        }
    ):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.3 * columns, 2.5 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
        t = np.arange(len(denoiser.buckets)) / 8
        for axes, (title, inside, outside) in zip(grid, panels, strict=False):
            greatest = denoiser.greatest[inside]
            known = ~np.isnan(greatest).all(axis=0)  # of some fractions a run may have seen nothing
            shown = np.maximum(greatest[:, known], 1e-3)
            axes.plot(t[known], shown.T, color=_LINE, alpha=0.35, linewidth=0.9)
            axes.plot(
                t[known],
                np.nanmedian(shown, axis=0),
                "-o",
                color=_LINE,
                linewidth=2.2,
                markersize=4,
            )
            axes.axvline(0, color=_FAINT, linewidth=0.8, linestyle=":")
            if outside:
                seen = context.greatest[outside][:, 0]
                axes.plot(
                    np.full(len(seen), -0.06),
                    np.maximum(seen, 1e-3),
                    "_",
                    color=_TEXT,
                    markersize=9,
                )
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(
                LogFormatter(labelOnlyBase=False, minor_thresholds=(1.2, 0.5))
            )
            axes.set_title(title, fontsize=9, color=_INK, loc="left")
            axes.grid(color="#d9dee4", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(
            "t, masked fraction of the block (0: clean text in the denoiser; orange: the context tower)",
            fontsize=9,
        )
        figure.supylabel("greatest magnitude", fontsize=9)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=130, facecolor="white")
    return {"ranges.svg": svg.getvalue(), "ranges.png": png.getvalue()}


def _of(tower: TowerStatistics, end: str) -> list[int]:
    """Inputs whose first weight's name ends so; `experts.` is not the end of `shared_experts.`."""
    return [i for i, name in enumerate(tower.names) if name == end or name.endswith(f".{end}")]
