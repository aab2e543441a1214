"""What each part costs, as a picture: quality and passes side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

__all__ = ["draw_sensitivity"]

_GOOD, _BAD, _FAINT = "#3b6fb6", "#c2571a", "#8b95a1"


def draw_sensitivity(report: Mapping[str, Any]) -> tuple[str, bytes]:
    """Quality and passes with one part quantized at a time, with intervals: as SVG text and PNG; needs matplotlib."""
    from matplotlib import rc_context  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    rows = [*report["sensitivity"].items(), ("all together", report["compared"])][::-1]
    budget = report["budget"]
    with rc_context({"svg.hashsalt": "twotower", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(9.2, 0.8 + 0.42 * len(rows)), layout="constrained")
        kept, passes = figure.subplots(1, 2, sharey=True)
        limits = ((kept, "retention", 1.0, 0.0, budget["percent"]), (passes, "inflation", 100.0, -100.0, budget["max_inflation"]))
        for axes, name, factor, shift, limit in limits:
            for y, (_, facts) in enumerate(rows):
                value, low, high = (facts[name][k] for k in ("value", "low", "high"))
                if value is None:
                    continue
                x, ends = factor * value + shift, [factor * end + shift for end in (low, high)]
                inside = x >= limit if name == "retention" else x <= limit
                bars = [[x - ends[0]], [ends[1] - x]]
                axes.errorbar([x], [y], xerr=bars, fmt="o", color=_GOOD if inside else _BAD, markersize=5, capsize=3, linewidth=1.2)
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
