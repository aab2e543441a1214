"""Stored arrays as numbers, with NumPy alone: bits of half-width floats, bytes of 4-bit pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config.formats import WeightFormat

__all__ = ["Array", "Floats", "expanded", "from_floats", "raw_dtype", "to_floats"]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_RAW: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "float8e4m3fn": np.uint8,
    "float8e8m0": np.uint8,
    "int4": np.uint8,
    "float4e2m1": np.uint8,
}
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FLOAT4 = np.concatenate([_FLOAT4, -_FLOAT4])


def raw_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type an array is carried in: bits where NumPy has no such type."""
    return np.dtype(_RAW[dtype])


def to_floats(raw: Array, dtype: str) -> Floats:
    """Numbers of a float type as float32; exact."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8e4m3fn":
        bits = ((raw.astype(np.uint16) & 0x80) << 8) | ((raw.astype(np.uint16) & 0x7F) << 7)
        return bits.view(np.float16).astype(np.float32) * np.float32(256)
    if dtype == "float8e8m0":
        return (raw.astype(np.uint32) << 23).view(np.float32)
    return raw.astype(np.float32)


def from_floats(values: Floats, dtype: str) -> Array:
    """Float32 numbers rounded to a float type, to nearest and ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # infinity is what the kernels store, too
            return values.astype(raw_dtype(dtype))
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


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
        return to_floats(raw, dtype)
    if how.bits == 4:
        codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(raw.shape[0], -1)
        values = (codes ^ 8).astype(np.float32) - 8 if how.dtype == "int4" else _FLOAT4[codes]
    else:
        values = to_floats(raw, how.dtype)
    if not how.group:
        return values
    assert scales is not None
    factors = to_floats(scales, how.scale_dtype or dtype)
    if whole is not None:
        factors = to_floats(
            from_floats(factors * to_floats(whole, dtype).reshape(()), dtype), dtype
        )
    grouped = values.reshape(raw.shape[0], -1, how.group) * factors[..., None]
    return to_floats(from_floats(grouped.reshape(values.shape), dtype), dtype)
