"""The picture of a calibration: how far the inputs of every kind of product reach, against the masked fraction of the block."""

from __future__ import annotations

import io

import numpy as np

from twotower.calibration.statistics import TowerStatistics
from twotower.calibration.statistics_file import Statistics
from twotower.spec import CONTEXT, DENOISER

__all__ = ["draw_ranges"]

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
_INK, _FAINT, _LINE, _TEXT = "#26303c", "#8b95a1", "#3b6fb6", "#c2571a"


def draw_ranges(statistics: Statistics) -> dict[str, bytes]:
    """The picture as `ranges.svg` and `ranges.png`; needs matplotlib.

    One panel a kind of input; a thin line a layer, a thick one their median. The leftmost point is clean text in the denoiser, which no
    step of generation ever sees, and the mark beside it the context tower on text.
    """
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import LogFormatter  # noqa: PLC0415

    denoiser, context = statistics.towers[DENOISER], statistics.towers[CONTEXT]
    panels = [(title, _of(denoiser, end), _of(context, end)) for end, title in _PANELS]
    panels = [panel for panel in panels if panel[1]]
    with rc_context({"svg.hashsalt": "twotower", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
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
            axes.plot(t[known], np.nanmedian(shown, axis=0), "-o", color=_LINE, linewidth=2.2, markersize=4)
            axes.axvline(0, color=_FAINT, linewidth=0.8, linestyle=":")
            if outside:
                seen = context.greatest[outside][:, 0]
                axes.plot(np.full(len(seen), -0.06), np.maximum(seen, 1e-3), "_", color=_TEXT, markersize=9)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.2, 0.5)))
            axes.set_title(title, fontsize=9, color=_INK, loc="left")
            axes.grid(color="#d9dee4", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel("t, masked fraction of the block (0: clean text in the denoiser; orange: the context tower)", fontsize=9)
        figure.supylabel("greatest magnitude", fontsize=9)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=130, facecolor="white")
    return {"ranges.svg": svg.getvalue(), "ranges.png": png.getvalue()}


def _of(tower: TowerStatistics, end: str) -> list[int]:
    """Inputs whose first weight's name ends so; `experts.` is not the end of `shared_experts.`."""
    return [i for i, name in enumerate(tower.names) if name == end or name.endswith(f".{end}")]
