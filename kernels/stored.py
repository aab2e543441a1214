"""Stored matrices as the numbers that kernels multiply: scales applied, pairs of 4 bits apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config.formats import WeightFormat
from twotower.dtypes import to_float32, to_stored

__all__ = ["Array", "Floats", "expanded"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FLOAT4 = np.concatenate([_FLOAT4, -_FLOAT4])


def expanded(
    raw: Array,
    how: WeightFormat | None,
    dtype: str,
    scales: Array | None = None,
    whole: Array | None = None,
) -> Floats:
    """Rows of a stored matrix [R, K or K/2] as the kernels multiply them, [R,K] float32.

    A scale a group is applied and the result rounded to `dtype`; a scale a row is not applied: it
    multiplies the sum.

    Args:
        raw: The values.
        how: Their format; None for `dtype` itself.
        dtype: The model's type.
        scales: Of the rows, [R, groups].
        whole: The scale of the scales, of formats that have one.
    """
    if how is None:
        return to_float32(raw, dtype)
    if how.bits == 4:
        codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(raw.shape[0], -1)
        values = (codes ^ 8).astype(np.float32) - 8 if how.dtype == "int4" else _FLOAT4[codes]
    else:
        values = to_float32(raw, how.dtype)
    if not how.group:
        return values
    assert scales is not None
    factors = to_float32(scales, how.scale_dtype or dtype)
    if whole is not None:
        factors = to_float32(
            to_stored(factors * to_float32(whole, dtype).reshape(()), dtype), dtype
        )
    grouped = values.reshape(raw.shape[0], -1, how.group) * factors[..., None]
    return to_float32(to_stored(grouped.reshape(values.shape), dtype), dtype)
