"""Pictures of evaluations, the impact of quantization and activation ranges, as SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from twotower.evaluate.evaluation import AR, DEFAULT, OTHER
from twotower.evaluate.quantization.impact import more_passes
from twotower.extras import require_libraries
from twotower.spec import CONTEXT, DENOISER

if TYPE_CHECKING:  # calibration needs what an evaluation does not
    from twotower.calibration.activation_statistics import Statistics, TowerStatistics

# Told apart without red against green.
_COLOURS = ("#3b6fb6", "#c2571a", "#3f8f5b", "#8a5aa8", "#7a7a2a", "#a03c5a")
_BLUE, _ORANGE = _COLOURS[:2]
_INK, _FAINT, _GRID = "#26303c", "#8b95a1", "#d9dee4"
_FAR = 1.6  # from this speedup on the baseline stands in a panel of its own


def require_charts() -> None:
    """Says before an hour of measuring (ConfigError) that matplotlib is missing at its end."""
    require_libraries("evaluate", "matplotlib", what="a report with a picture")


@contextmanager
def _figure(width: float, height: float, font: int = 9) -> Iterator[Any]:
    """An empty figure, to be drawn and saved inside."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(
        {
            "svg.hashsalt": "twotower",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": font,
        }
    ):
        # The figure itself draws: pyplot would look for a screen and keep every figure alive.
        yield Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, *, dpi: int = 150, transparent: bool = True) -> tuple[str, bytes]:
    """The figure as SVG, without what stands before its element, and as PNG."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=transparent)
    figure.savefig(png, format="png", dpi=dpi, facecolor="white")
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()


def _frame(axes: Any, grid: str = "both") -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curve(report: Mapping[str, Any]) -> tuple[str, bytes]:
    """Retention against speed, a line for each limit of steps, as SVG text and as PNG."""
    with _figure(9.2, 4.6, font=10) as figure:
        baseline, curve = _panels(figure, report)
        baseline.plot([1], [100], "s", color=_INK, markersize=7, label="autoregression")
        baseline.axvline(1, color=_FAINT, linewidth=0.8)
        _draw_sweep(curve, report["settings"])
        for name, marker, label in (
            (DEFAULT, "*", "default preset"),
            (OTHER, "D", "other bundle"),
        ):
            if name in report["settings"]:
                _draw_preset(
                    curve,
                    report["settings"][name]["total"],
                    marker,
                    label,
                )
        if "budget" in report:
            percent = report["budget"]["percent"]
            curve.axhline(percent, color=_FAINT, linewidth=0.9, linestyle="--")
            curve.annotate(
                f"budget {percent:g} %",
                (1, percent),
                fontsize=8,
                color=_FAINT,
                xytext=(-4, 4),
                textcoords="offset points",
                xycoords=("axes fraction", "data"),
                ha="right",
            )
        figure.supxlabel("speed: times the tokens per second of autoregression", fontsize=10)
        baseline.set_ylabel("right answers kept, % of autoregression's")
        handles: dict[str, Any] = {}
        for axes in (curve, baseline):
            _frame(axes)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        curve.legend(
            handles.values(), handles.keys(), frameon=False, fontsize=8.5, loc="lower left"
        )
        return _saved(figure)


def _panels(figure: Any, report: Mapping[str, Any]) -> tuple[Any, Any]:
    """Axes of the baseline and of the curve; two only if one would shrink the curve to a stroke."""
    totals = [setting["total"] for name, setting in report["settings"].items() if name != AR]
    speeds = [total["speedup"]["value"] for total in totals]
    if min((x for x in speeds if x is not None), default=1.0) < _FAR:
        axes = figure.add_subplot()
        return axes, axes
    baseline, curve = figure.subplots(
        1,
        2,
        sharey=True,
        width_ratios=(1, 8),
    )
    baseline.set_xlim(0.9, 1.1)
    baseline.set_xticks([1.0])
    curve.tick_params(left=False)
    curve.spines["left"].set_linestyle((0, (2, 4)))  # the axis is broken here
    return baseline, curve


def _draw_sweep(axes: Any, settings: Mapping[str, Any]) -> None:
    sweep: dict[int, list[tuple[float, dict[str, Any]]]] = {}
    for name, setting in settings.items():
        if name not in (AR, DEFAULT, OTHER):
            config = setting["config"]
            point = (config["confidence_threshold"], setting["total"])
            sweep.setdefault(config["steps_per_block"], []).append(point)
    for colour, (steps, points) in zip(
        cycle(_COLOURS),
        sorted(sweep.items()),
        strict=False,
    ):
        points.sort(key=lambda point: point[0])
        x = [total["speedup"]["value"] for _, total in points]
        y = [total["retention"]["value"] for _, total in points]
        label = f"at most {steps} passes a block"
        axes.plot(x, y, "-o", color=colour, markersize=4, linewidth=1.5, label=label)
        if steps != max(sweep):
            continue  # thresholds stand at one line only: the lines lie close together
        place = {
            "xytext": (5, 5),
            "textcoords": "offset points",
            "fontsize": 8,
            "color": colour,
        }
        for (threshold, _), a, b in zip(points, x, y, strict=True):
            axes.annotate(f"{threshold:g}", (a, b), **place)


def _draw_preset(
    axes: Any,
    total: Mapping[str, Any],
    marker: str,
    label: str,
) -> None:
    x, y = total["speedup"], total["retention"]
    if x["value"] is None or y["value"] is None:
        return
    axes.errorbar(
        x["value"],
        y["value"],
        xerr=_ends(x),
        yerr=_ends(y),
        fmt=marker,
        color=_INK,
        markersize=13 if marker == "*" else 7,
        capsize=3,
        linewidth=1,
        label=label,
        zorder=5,
    )


def _ends(interval: Mapping[str, float]) -> list[list[float]]:
    """How far the ends of an interval are from its value, as an error bar takes them."""
    value = interval["value"]
    return [[value - interval["low"]], [interval["high"] - value]]


def draw_sensitivity(report: Mapping[str, Any]) -> tuple[str, bytes]:
    """Quality and passes with one part quantized at a time, with intervals, as SVG and PNG."""
    rows = [*report["sensitivity"].items(), ("all together", report["compared"])][::-1]
    budget = report["budget"]
    with _figure(9.2, 0.8 + 0.42 * len(rows)) as figure:
        kept, passes = figure.subplots(1, 2, sharey=True)
        for y, (_, facts) in enumerate(rows):
            retention, more = facts["retention"], more_passes(facts["inflation"])
            if retention["value"] is not None:
                inside = retention["value"] >= budget["percent"]
                _draw_interval(kept, y, retention, inside=inside)
            if more["value"] is not None:
                inside = more["value"] <= budget["max_inflation"]
                _draw_interval(passes, y, more, inside=inside)
        for axes, limit in ((kept, budget["percent"]), (passes, budget["max_inflation"])):
            axes.axvline(limit, color=_FAINT, linewidth=0.9, linestyle="--")
            axes.set_yticks(range(len(rows)), [label for label, _ in rows])
            axes.set_ylim(-0.6, len(rows) - 0.4)
            _frame(axes, "x")
        kept.set_xlabel("right answers kept, %")
        passes.set_xlabel("more passes a block, %")
        return _saved(figure)


def _draw_interval(
    axes: Any,
    y: int,
    interval: Any,
    *,
    inside: bool,
) -> None:
    axes.errorbar(
        interval["value"],
        y,
        xerr=_ends(interval),
        fmt="o",
        color=_BLUE if inside else _ORANGE,
        markersize=5,
        capsize=3,
        linewidth=1.2,
    )


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


def draw_ranges(statistics: Statistics) -> dict[str, bytes]:
    """The picture as `ranges.svg` and `ranges.png`; needs matplotlib.

    One panel a kind of input, a thin line a layer, a thick one their median. The leftmost point is
    clean text in the denoiser, which generation never sees; the mark beside it is the context tower
    on text.
    """
    denoiser, context = statistics.towers[DENOISER], statistics.towers[CONTEXT]
    panels = [(title, _of(denoiser, end), _of(context, end)) for end, title in _PANELS]
    panels = [panel for panel in panels if panel[1]]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with _figure(3.3 * columns, 2.5 * rows + 0.4) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).reshape(-1)
        t = np.arange(len(denoiser.buckets)) / 8
        for axes, (title, inside, outside) in zip(grid, panels, strict=False):
            _draw_panel(
                axes,
                t,
                denoiser.amax[inside],
                context.amax[outside][:, 0],
            )
            axes.set_title(title, fontsize=9, color=_INK, loc="left")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(
            "t, masked fraction of the block "
            "(0: clean text in the denoiser; orange: the context tower)",
            fontsize=9,
        )
        figure.supylabel("largest magnitude (amax)", fontsize=9)
        svg, png = _saved(figure, dpi=130, transparent=False)
    return {"ranges.svg": svg.encode(), "ranges.png": png}


def _draw_panel(
    axes: Any,
    t: Any,
    denoiser: Any,
    context: Any,
) -> None:
    """Largest magnitudes of inputs by t, [inputs, t], and in the context tower, [inputs]."""
    from matplotlib.ticker import LogFormatter  # noqa: PLC0415

    known = ~np.isnan(denoiser).all(axis=0)  # of some fractions a run may have seen nothing
    shown = np.maximum(denoiser[:, known], 1e-3)
    median = np.nanmedian(shown, axis=0)
    axes.plot(t[known], shown.T, color=_BLUE, alpha=0.35, linewidth=0.9)
    axes.plot(t[known], median, "-o", color=_BLUE, linewidth=2.2, markersize=4)
    axes.axvline(0, color=_FAINT, linewidth=0.8, linestyle=":")
    left = np.full(len(context), -0.06)
    axes.plot(left, np.maximum(context, 1e-3), "_", color=_ORANGE, markersize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.2, 0.5)))
    _frame(axes)


def _of(tower: TowerStatistics, end: str) -> list[int]:
    """Inputs whose first weight's name ends so; `experts.` is not the end of `shared_experts.`."""
    return [i for i, name in enumerate(tower.names) if name == end or name.endswith(f".{end}")]
