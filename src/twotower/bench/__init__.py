"""Time and memory, as ratios of things measured in one run.

What measures an export needs the extras `export` and `cpu` when it is called.
"""

from twotower.bench.speed import (
    ExportCost,
    GenerationSpeed,
    PassTimes,
    measure_export,
    measure_generation,
    measure_in_turns,
    measure_passes,
)

__all__ = [
    "ExportCost",
    "GenerationSpeed",
    "PassTimes",
    "measure_export",
    "measure_generation",
    "measure_in_turns",
    "measure_passes",
]
