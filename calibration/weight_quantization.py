"""Weights as quantized values and scales: plainly rounded, or clipped where that costs least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config.formats import WeightFormat
from twotower.dtypes import numpy_dtype

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

ROUNDINGS = ("plain", "mse")
"""`plain`: the greatest weight of a group is the greatest value. `mse`: the greatest weights are
clipped where that makes the sum of squared errors of the group smaller, because all others then get
finer steps."""

_CLIPS = {
    "int8": (1.0, 0.96, 0.92),
    "fp8": (1.0,),
    "int4": tuple(np.linspace(1.0, 0.6, 11)),
    "nvfp4": tuple(np.linspace(1.0, 0.64, 10)),
}
"""Fractions of a group's greatest weight that are tried as the greatest value. A float format has
as many steps in every octave, so that clipping 8-bit floats gains nothing."""

_GREATEST_SCALE, _LEAST_SCALE = 448.0, 2.0**-9  # of float8e4m3fn
_SMALLEST_SCALE = 2.0**-24  # positive in float16 too; a group of zeros is zero whatever its scale


def global_scale(amax: float, how: WeightFormat, dtype: str) -> Array:
    """The scale [] of a tensor's 8-bit scales: its greatest group gets the greatest one."""
    value = amax / (how.largest * _GREATEST_SCALE)
    return np.asarray(max(value, _SMALLEST_SCALE)).astype(numpy_dtype(dtype))


def quantize_rows(
    x: Floats,
    how: WeightFormat,
    dtype: str,
    *,
    rounding: str = "plain",
    shared: Array | None = None,
) -> tuple[Array, Array]:
    """Rows [R,K] as values [R,K] and scales [R, K/group], both in the types they are stored in.

    The scale is rounded to its own type first and the values are made with the rounded one, because
    readers multiply by that. `dtype` is the graph's, and the scales' unless the format has one of
    its own; `shared` is the global scale of formats that have one.
    """
    grouped = x.reshape(x.shape[0], how.groups(x.shape[1]), -1)
    groups = _Groups(grouped, how, dtype, shared)
    amax = np.abs(grouped).max(axis=-1, keepdims=True)
    values, scales = groups.quantized(amax)
    clips = _CLIPS[how.name][1:] if rounding == "mse" else ()
    least = groups.error(values, scales) if clips else amax
    for clip in clips:
        clipped, clipped_scales = groups.quantized(amax * np.float32(clip))
        error = groups.error(clipped, clipped_scales)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(values, clipped, where=better)
        np.copyto(scales, clipped_scales, where=better)
    return values.astype(numpy_dtype(how.dtype)).reshape(x.shape), scales[..., 0]


def expand_rows(values: Array, scales: Array, shared: Array | None = None) -> Floats:
    """Values [R,K] times scales [R, K/group] in float32 [R,K], as DequantizeLinear computes it."""
    grouped = values.reshape(values.shape[0], scales.shape[1], -1)
    return (grouped.astype(np.float32) * _wide(scales[..., None], shared)).reshape(values.shape)


def pack(values: Array, dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes [n] of values as ONNX stores them; 4-bit values lie two a byte, low half first.

    The number of 4-bit values must be even.
    """
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if dtype not in ("int4", "float4e2m1"):
        return raw
    return np.asarray((raw[0::2] & 15) | (raw[1::2] << 4), np.uint8)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Rows of weights [R,G,K/G], of which each group shares a scale [R,G,1]."""

    weights: Floats
    how: WeightFormat
    dtype: str
    shared: Array | None

    def quantized(self, amax: Floats) -> tuple[Floats, Array]:
        """Values as float32, exactly those of the format, and scales as they are stored."""
        how, largest = self.how, self.how.largest
        scales = self._scales(amax / np.float32(largest))
        values = self.weights / _wide(scales, self.shared)
        np.clip(values, -largest, largest, out=values)
        if how.dtype in ("int8", "int4"):
            np.rint(values, out=values)
        elif how.dtype == "float4e2m1":
            # Steps of 1/2 below 2, of 1 below 4, of 2 above: the even multiple is the even bit
            # pattern, so this is the cast, ten times as fast.
            steps = np.where(
                np.abs(values) < 4,
                np.float32(1),
                np.float32(2),
            )
            np.copyto(
                steps,
                np.float32(0.5),
                where=np.abs(values) < 2,
            )
            values /= steps
            np.rint(values, out=values)
            values *= steps
        else:
            values = values.astype(numpy_dtype(how.dtype)).astype(np.float32)
        return values, scales

    def _scales(self, wanted: Floats) -> Array:
        if self.shared is None:
            dtype, scales = self.dtype, np.maximum(wanted, _SMALLEST_SCALE)
        else:
            dtype = self.how.scale_dtype or self.dtype
            scales = np.clip(
                wanted / np.float32(self.shared),
                _LEAST_SCALE,
                _GREATEST_SCALE,
            )
        return np.asarray(scales.astype(numpy_dtype(dtype)))

    def error(self, values: Floats, scales: Array) -> Floats:
        """Sums of squares [R,G,1]."""
        difference = values * _wide(scales, self.shared)
        difference -= self.weights
        return np.asarray(np.einsum("rgk,rgk->rg", difference, difference)[..., None], np.float32)


def _wide(scales: Array, shared: Array | None) -> Floats:
    wide = scales.astype(np.float32)
    if shared is None:
        return wide
    return wide * np.float32(shared)
