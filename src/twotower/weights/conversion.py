"""Elements of weights: read out of a mapped data file, and streamed from a checkpoint into another float dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from twotower.checkpoint.shard import Tensor
from twotower.dtypes import numpy_dtype, to_float32, to_stored
from twotower.errors import ExportError
from twotower.weights.refs import WeightRef

__all__ = ["convert_chunks", "read_weight"]


_Floats = np.ndarray[Any, np.dtype[np.float32]]
_Bytes = bytes | np.ndarray[Any, np.dtype[Any]]


def read_weight(
    data: np.ndarray[Any, np.dtype[np.uint8]], ref: WeightRef
) -> np.ndarray[Any, np.dtype[Any]]:
    """One weight out of a mapped data file: a view where a byte or more is an element, bfloat16 widened to float32 (a copy).

    Types of 4 bits are unpacked (a copy): int4 to int8, float4e2m1 to the type of that name in
    ml_dtypes.
    """
    raw = data[ref.offset : ref.offset + ref.nbytes]
    if ref.dtype == "bfloat16":
        return to_float32(raw, ref.dtype).reshape(ref.shape)
    if ref.dtype in ("int4", "float4e2m1"):
        halves = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)[: math.prod(ref.shape)]
        if ref.dtype == "int4":
            return np.asarray((halves.astype(np.int8) ^ 8) - 8).reshape(ref.shape)
        return halves.view(numpy_dtype(ref.dtype)).reshape(ref.shape)
    return raw.view(numpy_dtype(ref.dtype)).reshape(ref.shape)


def convert_chunks(tensor: Tensor, dtype: str, *, chunk_bytes: int) -> Iterator[_Bytes]:
    """The tensor's elements in order as little-endian `dtype`, in pieces that stand for at most `chunk_bytes` of the source.

    Raises:
        ExportError: a finite value is too large for float16.
    """
    if tensor.dtype == dtype:
        yield from tensor.chunks(chunk_bytes)
        return
    pieces = tensor.chunks(chunk_bytes)
    for raw in pieces:
        wide = to_float32(np.frombuffer(raw, np.uint8), tensor.dtype)
        if dtype == "float32":
            yield wide
        elif dtype == "bfloat16":
            yield to_stored(wide, dtype)
        else:
            narrow = _float16(wide)
            if narrow is None:
                raise _overflow(tensor, chain([raw], pieces))
            yield narrow


def _float16(x: _Floats) -> np.ndarray[Any, np.dtype[np.float16]] | None:
    """Rounded to nearest; None if a finite value would become infinite."""
    with np.errstate(over="ignore"):
        out = x.astype(np.float16)
    return None if (np.isinf(out) & np.isfinite(x)).any() else out


def _overflow(tensor: Tensor, pieces: Iterable[bytes]) -> ExportError:
    """Looks through the rest of the tensor too: the largest value decides what to do, not the first one too large."""
    largest = 0.0
    for raw in pieces:
        wide = to_float32(np.frombuffer(raw, np.uint8), tensor.dtype)
        largest = max(largest, float(np.abs(wide[np.isfinite(wide)]).max(initial=0)))
    return ExportError(
        f"tensor {tensor.name} does not fit float16",
        found=f"a value of magnitude {largest:g}; float16 ends at 65504",
        do="export with --dtype bfloat16 (same size) or float32",
    )
