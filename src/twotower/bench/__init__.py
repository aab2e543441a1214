"""Time and memory, as ratios of things measured in one run.

What measures an export needs the extras `export` and `cpu`; it is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twotower.bench.speed import (
    GenerationSpeed,
    PassTimes,
    measure_generation,
    measure_in_turns,
    measure_passes,
)

if TYPE_CHECKING:
    from twotower.bench.export_cost import ExportCost, measure_export

__all__ = [
    "ExportCost",
    "GenerationSpeed",
    "PassTimes",
    "measure_export",
    "measure_generation",
    "measure_in_turns",
    "measure_passes",
]


def __getattr__(name: str) -> Any:
    if name in ("ExportCost", "measure_export"):
        from twotower.bench import export_cost

        return getattr(export_cost, name)
    raise AttributeError(f"module 'twotower.bench' has no attribute {name!r}")
