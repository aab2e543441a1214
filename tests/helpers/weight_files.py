"""Data files as an export lays them out, and what of them is on a fake's device."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twotower.bundle import FileRecord, hash_file
from twotower.weights.refs import WeightRef, aligned

__all__ = ["bytes_on_device", "record_of", "write_weights"]


def write_weights(path: Path, sizes: Sequence[int], *, seed: int = 0) -> dict[str, WeightRef]:
    """Writes weights of these sizes, each where an export would put it; padding is not zero."""
    random = np.random.default_rng(seed)
    weights: dict[str, WeightRef] = {}
    end = 0
    for number, size in enumerate(sizes):
        weights[f"w{number}"] = WeightRef("int8", (size,), aligned(end, size))
        end = weights[f"w{number}"].end
    path.write_bytes(random.bytes(end))
    return weights


def record_of(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, hash_file(path))


def bytes_on_device(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)
