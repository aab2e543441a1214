"""The kernels in NumPy, step for step over the same arrays: a reference without a GPU.

A row's result is the same to the bit whatever rows lie beside it: each pair is one product of a
matrix and a vector, and a token's rows are added in ascending order of experts, the shared ones
last. Sums within a product are float32 in another order than a GPU's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config.formats import WeightFormat
from twotower.dtypes import carried_dtype, to_float32, to_stored
from twotower.kernels.shape import ExpertShape

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

    A scale a group ([R, groups], times `whole` if present) is applied and the result rounded to
    `dtype`; a scale a row is not applied: it multiplies the sum. `how` None means `dtype` itself.
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
        product = factors * to_float32(whole, dtype).reshape(())
        factors = to_float32(to_stored(product, dtype), dtype)
    grouped = values.reshape(raw.shape[0], -1, how.group) * factors[..., None]
    return to_float32(to_stored(grouped.reshape(values.shape), dtype), dtype)


def experts_twin(
    shape: ExpertShape, x: Array, shares: Floats, weights: Mapping[str, Array]
) -> Array:
    """The result of one layer's experts.

    Args:
        shape: The layer.
        x: Tokens [.., D] in `shape.dtype` (bfloat16 as its bits, uint16).
        shares: [E,N] float32, 0 where an expert is not chosen.
        weights: Stored arrays by the names of `weight_names`, 4-bit ones two to a byte.

    Returns:
        The shape and type of `x`.
    """
    rows = np.ascontiguousarray(x.reshape(-1, shape.hidden))
    experts, share_of = pairs_twin(shape, shares)
    h, shared_h = up_twin(shape, rows, experts, weights)
    y = down_twin(shape, (h, shared_h), (experts, share_of), weights)
    return combine_twin(shape, y, share_of).reshape(x.shape)


def pairs_twin(shape: ExpertShape, shares: Floats) -> tuple[Array, Floats]:
    """The expert [N,TOP] (int32, -1 for none) and the share of each slot of each token."""
    count = shares.shape[1]
    experts = np.full((count, shape.top), -1, np.int32)
    share_of = np.zeros((count, shape.top), np.float32)
    for token in range(count):
        chosen = np.flatnonzero(shares[:, token])[: shape.top]  # NaN counts: it is not 0
        experts[token, : len(chosen)] = chosen
        share_of[token, : len(chosen)] = shares[chosen, token]
    return experts, share_of


def up_twin(
    shape: ExpertShape, x: Array, experts: Array, weights: Mapping[str, Array]
) -> tuple[Array, Array]:
    """Hidden rows of the pairs [N*TOP,F] and of the shared experts [S*N,SF], model's type."""
    tokens = to_float32(x, shape.dtype)
    count = len(tokens)
    h = np.zeros((experts.size, shape.width), carried_dtype(shape.dtype))
    for expert in np.unique(experts[experts >= 0]):
        matrix = _Matrix(shape, "up", weights, expert)
        for pair in np.flatnonzero(experts.reshape(-1) == expert):
            h[pair] = _squared_relu(matrix.times(tokens[pair // shape.top]), shape.dtype)
    shared = np.zeros((shape.shared * count, shape.shared_width), carried_dtype(shape.dtype))
    for s in range(shape.shared):
        matrix = _Matrix(shape, "shared_up", weights, s)
        for token in range(count):
            shared[s * count + token] = _squared_relu(matrix.times(tokens[token]), shape.dtype)
    return h, shared


def down_twin(
    shape: ExpertShape,
    hidden: tuple[Array, Array],
    pairs: tuple[Array, Floats],
    weights: Mapping[str, Array],
) -> Array:
    """Rows of results [N*TOP + S*N, D] times their shares, model's type; unused ones are 0."""
    experts, share_of = pairs
    routed, shared = (to_float32(rows, shape.dtype) for rows in hidden)
    y = np.zeros((len(routed) + len(shared), shape.hidden), carried_dtype(shape.dtype))
    for expert in np.unique(experts[experts >= 0]):
        matrix = _Matrix(shape, "down", weights, expert)
        for pair in np.flatnonzero(experts.reshape(-1) == expert):
            with np.errstate(invalid="ignore", over="ignore"):
                row = matrix.times(routed[pair]) * share_of.reshape(-1)[pair]
            y[pair] = to_stored(row, shape.dtype)
    for s in range(shape.shared):
        matrix = _Matrix(shape, "shared_down", weights, s)
        for token in range(len(experts)):
            place = s * len(experts) + token
            y[len(routed) + place] = to_stored(matrix.times(shared[place]), shape.dtype)
    return y


def combine_twin(shape: ExpertShape, y: Array, share_of: Floats) -> Array:
    """The rows of each token added, [N,D]: slots in order, then the shared experts."""
    count = len(share_of)
    total = np.zeros((count, shape.hidden), np.float32)
    for slot in range(shape.top):
        rows = to_float32(y[slot : count * shape.top : shape.top], shape.dtype)
        total += np.where(share_of[:, slot : slot + 1] != 0, rows, np.float32(0))
    for s in range(shape.shared):
        first = count * (shape.top + s)
        total += to_float32(y[first : first + count], shape.dtype)
    return to_stored(total, shape.dtype)


class _Matrix:
    """One expert's matrix, expanded."""

    def __init__(
        self, shape: ExpertShape, name: str, weights: Mapping[str, Array], index: int
    ) -> None:
        how = shape.weights.of(name)
        raw, scales = weights[name], weights.get(f"{name}_scale")
        if name == "shared_up":
            part: tuple[slice, ...] | int = (
                slice(index * shape.shared_width, (index + 1) * shape.shared_width),
            )
            scale_part = part
        elif name == "shared_down":
            part = _columns(index, raw.shape[1] // shape.shared)
            scale_part = (slice(None),)
            if how is not None and how.group and scales is not None:
                scale_part = _columns(index, scales.shape[1] // shape.shared)
        else:
            part = scale_part = int(index)
        own_scales = None if scales is None else scales[scale_part]
        whole = weights.get(f"{name}_global_scale")
        values = expanded(raw[part], how, shape.dtype, own_scales, whole)
        self._values = np.ascontiguousarray(values)
        self._factors: Floats | None = None
        if how is not None and not how.group and own_scales is not None:
            self._factors = to_float32(own_scales, shape.dtype).reshape(-1)

    def times(self, row: Floats) -> Floats:
        """The product with a vector, float32."""
        with np.errstate(invalid="ignore", over="ignore"):
            out: Floats = self._values @ np.ascontiguousarray(row)
            return out if self._factors is None else out * self._factors


def _columns(index: int, width: int) -> tuple[slice, ...]:
    return (slice(None), slice(index * width, (index + 1) * width))


def _squared_relu(values: Floats, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        positive = np.maximum(values, np.float32(0))
        return to_stored(positive * positive, dtype)
