"""Numbers to few bits: values and scales of rows of weights, by plain rounding or with the clipping that costs least."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config.formats import WeightFormat
from twotower.dtypes import numpy_dtype

__all__ = ["ROUNDINGS", "expand_rows", "global_scale", "pack", "quantize_rows"]

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

ROUNDINGS = ("plain", "mse")
"""`plain`: the greatest weight of a group is the greatest value. `mse`: the greatest weights are clipped where that makes the sum of
squared errors of the group smaller, because all others then get finer steps.
"""

_CLIPS = {
    "int8": (1.0, 0.96, 0.92),
    "fp8": (1.0,),
    "int4": tuple(np.linspace(1.0, 0.6, 11)),
    "nvfp4": tuple(np.linspace(1.0, 0.64, 10)),
}
"""Fractions of a group's greatest weight that are tried as the greatest value. A float format has as many steps in every octave, so
that clipping 8-bit floats gains nothing.
"""

_GREATEST_SCALE, _LEAST_SCALE = 448.0, 2.0**-9  # of float8e4m3fn
_SMALLEST_SCALE = 2.0**-24  # positive in float16 too; a group of zeros is zero whatever its scale


def global_scale(greatest: float, how: WeightFormat, dtype: str) -> Array:
    """The scale of a tensor's scales [] in `dtype`: its greatest group gets the greatest 8-bit scale.

    Args:
        greatest: The tensor's greatest magnitude.
        how: A format with scales of 8 bits.
        dtype: The graph's element type.
    """
    value = greatest / (how.largest * _GREATEST_SCALE)
    return np.asarray(max(value, _SMALLEST_SCALE)).astype(numpy_dtype(dtype))


def quantize_rows(
    x: Floats,
    how: WeightFormat,
    dtype: str,
    *,
    rounding: str = "plain",
    shared: Array | None = None,
) -> tuple[Array, Array]:
    """Rows [R,K] as values [R,K] (the numpy type of the format) and scales [R, K/group], both as they are stored.

    The scale is rounded to its own type first and the values are made with the rounded one: what
    reads them back multiplies by that.

    Args:
        x: The rows.
        how: The format.
        dtype: The graph's element type, which is the scales' unless the format has one of its own.
        rounding: One of `ROUNDINGS`.
        shared: The global scale, for formats that have one.
    """
    grouped = x.reshape(x.shape[0], how.groups(x.shape[1]), -1)
    greatest = np.abs(grouped).max(axis=-1, keepdims=True)
    clips = _CLIPS[how.name] if rounding == "mse" else (1.0,)
    units, scales = _rounded(grouped, greatest, how, dtype, shared)
    if len(clips) > 1:
        least = _error(grouped, units, scales, shared)
        for clip in clips[1:]:
            other, other_scales = _rounded(grouped, greatest * np.float32(clip), how, dtype, shared)
            error = _error(grouped, other, other_scales, shared)
            better = error < least
            np.copyto(least, error, where=better)
            np.copyto(units, other, where=better)
            np.copyto(scales, other_scales, where=better)
    return units.astype(numpy_dtype(how.dtype)).reshape(x.shape), scales[..., 0]


def expand_rows(values: Array, scales: Array, shared: Array | None = None) -> Floats:
    """What values [R,K] and scales [R, K/group] stand for, [R,K] float32: the arithmetic of DequantizeLinear."""
    grouped = values.reshape(values.shape[0], scales.shape[1], -1)
    return (grouped.astype(np.float32) * _wide(scales[..., None], shared)).reshape(values.shape)


def pack(values: Array, dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes of values as ONNX stores them, [n]: two of 4 bits to a byte, the first in the low half.

    The number of 4-bit values must be even.
    """
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if dtype not in ("int4", "float4e2m1"):
        return raw
    return np.asarray((raw[0::2] & 15) | (raw[1::2] << 4), np.uint8)


def _rounded(
    grouped: Floats, greatest: Floats, how: WeightFormat, dtype: str, shared: Array | None
) -> tuple[Floats, Array]:
    """The values as float32, exactly those of the format, and the scales as they are stored."""
    scales = _scales(greatest, how, dtype, shared)
    units = grouped / _wide(scales, shared)
    np.clip(units, -how.largest, how.largest, out=units)
    if how.dtype in ("int8", "int4"):
        np.rint(units, out=units)
    elif how.dtype == "float4e2m1":
        # Steps of 1/2 below 2, of 1 below 4, of 2 above: the even multiple is the even bit pattern,
        # so this is the cast, ten times as fast.
        steps = np.where(np.abs(units) < 4, np.float32(1), np.float32(2))
        np.copyto(steps, np.float32(0.5), where=np.abs(units) < 2)
        units /= steps
        np.rint(units, out=units)
        units *= steps
    else:
        units = units.astype(numpy_dtype(how.dtype)).astype(np.float32)
    return units, scales


def _scales(greatest: Floats, how: WeightFormat, dtype: str, shared: Array | None) -> Array:
    wanted = greatest / np.float32(how.largest)
    if shared is None:
        return np.asarray(np.maximum(wanted, _SMALLEST_SCALE).astype(numpy_dtype(dtype)))
    units = np.clip(wanted / np.float32(shared), _LEAST_SCALE, _GREATEST_SCALE)
    return np.asarray(units.astype(numpy_dtype(how.scale_dtype or dtype)))


def _wide(scales: Array, shared: Array | None) -> Floats:
    wide = scales.astype(np.float32)
    return wide if shared is None else wide * np.float32(shared)


def _error(grouped: Floats, units: Floats, scales: Array, shared: Array | None) -> Floats:
    difference = units * _wide(scales, shared)
    difference -= grouped
    return np.asarray(np.einsum("rgk,rgk->rg", difference, difference)[..., None], np.float32)
