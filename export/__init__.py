"""Checkpoint to bundle: reading the published layout, recording the graphs, streaming the weights, verifying the result."""

from twotower.export.checkpoint import Checkpoint, locate_checkpoint
from twotower.export.exporter import ExportConfig, export_bundle
from twotower.export.summary import ModelSummary, summarize

__all__ = ["Checkpoint", "ExportConfig", "ModelSummary", "export_bundle", "locate_checkpoint", "summarize"]
