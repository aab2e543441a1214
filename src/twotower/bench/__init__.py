"""Time and memory, as ratios of things measured in one run."""

from twotower.bench.export_cost import ExportCost, measure_export
from twotower.bench.generation import GenerationSpeed, measure_generation

__all__ = ["ExportCost", "GenerationSpeed", "measure_export", "measure_generation"]
