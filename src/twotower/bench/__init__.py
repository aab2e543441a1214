"""Time and memory, as ratios of things measured in one run."""

from twotower.bench.export_cost import ExportCost, measure_export
from twotower.bench.generation import GenerationSpeed, measure_generation
from twotower.bench.passes import PassTimes, measure_passes

__all__ = ["ExportCost", "GenerationSpeed", "PassTimes", "measure_export", "measure_generation", "measure_passes"]
