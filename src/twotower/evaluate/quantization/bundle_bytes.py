"""Bytes of bundles: all files, and the weights by layer kind, against what they would be in bfloat16."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twotower.bundle import GRAPH_FILES, MANIFEST_FILE, Bundle
from twotower.calibration.quantize import precision_of
from twotower.checkpoint.layout import expected_tensors
from twotower.export.graphs import Precision, build_graph

__all__ = ["bytes_by_kind", "bytes_report"]


def bytes_by_kind(bundle: Bundle, dtype: str | None = None) -> dict[str, int]:
    """Bytes of the weights of all graphs by layer kind; with a dtype those of a float bundle in that type."""
    quantized = dtype is None and bundle.quantization is not None
    precision = precision_of(bundle) if quantized else Precision()
    known = expected_tensors(bundle.config)
    out: Counter[str] = Counter()
    for name in GRAPH_FILES:
        for weight in build_graph(name, bundle.config, dtype or bundle.dtype, precision).weights:
            out[known[weight.sources[0]].role.value] += weight.nbytes
    return dict(out)


def bytes_report(quantized: Bundle, reference: Bundle) -> dict[str, Any]:
    """Before, after, and in bfloat16; the files of engines, which can be built again, are not counted."""
    after, before, half = bytes_by_kind(quantized), bytes_by_kind(reference), bytes_by_kind(reference, "bfloat16")
    return {
        "files": {"before": _files(reference), "after": _files(quantized)},
        "weights": {"before": sum(before.values()), "after": sum(after.values()), "bfloat16": sum(half.values())},
        "kinds": {kind: {"before": before[kind], "after": after[kind], "bfloat16": half[kind]} for kind in sorted(before)},
    }


def _files(bundle: Bundle) -> int:
    return sum(record.size for record in bundle.files.values()) + (bundle.path / MANIFEST_FILE).stat().st_size
