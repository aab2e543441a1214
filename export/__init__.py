"""Checkpoint to bundle: recording the graphs, streaming the weights, verifying the result.

Reading a checkpoint needs numpy alone; what writes graphs needs the extra `export` and is imported
when its name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twotower.checkpoint.reader import Checkpoint, locate_checkpoint
from twotower.checkpoint.summary import ModelSummary, summarize

if TYPE_CHECKING:
    from twotower.export.exporter import ExportConfig, export_bundle, export_programs

__all__ = [
    "Checkpoint",
    "ExportConfig",
    "ModelSummary",
    "export_bundle",
    "export_programs",
    "locate_checkpoint",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name in ("ExportConfig", "export_bundle", "export_programs"):
        from twotower.export import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module 'twotower.export' has no attribute {name!r}")
