"""Weights read out of a mapped data file: whole, or in pieces of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.dtypes import numpy_dtype, to_float32
from twotower.weights.refs import WeightRef

PIECE_BYTES = 16 << 20
"""The most bytes of a piece, raw or as float32."""

_Data = npt.NDArray[np.uint8]


def read_weight(data: _Data, ref: WeightRef) -> npt.NDArray[Any]:
    """One weight of a mapped data file: a view where elements are whole bytes.

    Copies: bfloat16 is widened to float32, int4 unpacked to int8, float4e2m1 to ml_dtypes' type.
    """
    raw = data[ref.offset : ref.end]
    if ref.dtype == "bfloat16":
        return to_float32(raw, ref.dtype).reshape(ref.shape)
    if ref.dtype in ("int4", "float4e2m1"):
        halves = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)[: math.prod(ref.shape)]
        if ref.dtype == "int4":
            return np.asarray((halves.astype(np.int8) ^ 8) - 8).reshape(ref.shape)
        return halves.view(numpy_dtype(ref.dtype)).reshape(ref.shape)
    return raw.view(numpy_dtype(ref.dtype)).reshape(ref.shape)


def raw_pieces(data: _Data, ref: WeightRef) -> Iterator[_Data]:
    """The bytes of a weight as they lie."""
    for first in range(ref.offset, ref.end, PIECE_BYTES):
        yield data[first : min(first + PIECE_BYTES, ref.end)]


def float32_pieces(data: _Data, ref: WeightRef) -> Iterator[npt.NDArray[np.float32]]:
    """The elements of a weight in order, as float32."""
    elements = replace(ref, shape=(math.prod(ref.shape), 1))
    for piece in elements.split(PIECE_BYTES // 4):
        yield read_weight(data, piece).astype(np.float32, copy=False)
