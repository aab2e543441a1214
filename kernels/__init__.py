"""Mixture-of-experts kernels for NVIDIA GPUs: only chosen experts are read and computed.

`twotower.kernels.compile` makes cubins and needs Triton; everything else here is NumPy.
"""

from __future__ import annotations

from twotower.kernels.cubin_manifest import Cubin, Manifest, read_manifest
from twotower.kernels.launches import Launch, launches, scratch_bytes, weight_names
from twotower.kernels.shape import MOST_TOKENS, ExpertFormats, ExpertShape
from twotower.kernels.twin import experts_twin

__all__ = [
    "MOST_TOKENS",
    "Cubin",
    "ExpertFormats",
    "ExpertShape",
    "Launch",
    "Manifest",
    "experts_twin",
    "launches",
    "read_manifest",
    "scratch_bytes",
    "weight_names",
]
