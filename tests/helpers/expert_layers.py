"""Layers of experts: weights in every stored format, routings of every kind, float64 results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twotower.calibration.weight_quantization import expand_rows, global_scale, pack, quantize_rows
from twotower.config.formats import WeightFormat, stored_format
from twotower.dtypes import carried_dtype, numpy_dtype, to_float32, to_stored
from twotower.kernels.shape import MATRICES, ExpertFormats, ExpertShape
from twotower.kernels.twin import Array

__all__ = [
    "FORMAT_NAMES",
    "ROUTINGS",
    "Layer",
    "exact",
    "make_shape",
    "random_layer",
    "routing",
    "tokens",
]

MXFP4 = WeightFormat("mxfp4", "float4e2m1", 6.0, group=32, scale_dtype="float8e8m0")

FORMAT_NAMES: Mapping[str, tuple[str, int]] = {
    "float": ("", 0),
    "int8": ("int8", 0),
    "int8-groups": ("int8", 64),
    "int4-32": ("int4", 32),
    "int4-64": ("int4", 64),
    "int4-128": ("int4", 128),
    "fp8": ("fp8", 0),
    "nvfp4": ("nvfp4", 16),
    "mxfp4": ("mxfp4", 32),
}
"""Name -> name of the format and its group."""

ROUTINGS = ("uniform", "one", "few", "skewed", "fewer")


def make_shape(
    hidden: int,
    width: int,
    experts: int,
    top: int,
    *,
    shared: int = 0,
    dtype: str = "float32",
    routed: str = "float",
    others: str = "float",
) -> ExpertShape:
    """A layer whose routed weights have one format and whose shared ones have another."""

    def how(name: str, columns: int) -> WeightFormat | None:
        kind, group = FORMAT_NAMES[name]
        if name == "mxfp4":
            return MXFP4
        if name == "int8-groups":
            return stored_format("int8", columns, stacked=True)
        return None if not kind else stored_format(kind, columns, stacked=False, group=group)

    formats = ExpertFormats(
        how(routed, hidden), how(routed, width), how(others, hidden), how(others, width)
    )
    return ExpertShape(
        hidden=hidden,
        width=width,
        experts=experts,
        top=top,
        shared_intermediate=shared,
        dtype=dtype,
        weights=formats,
    )


@dataclass(frozen=True)
class Layer:
    """A layer's weights.

    Attributes:
        shape: Its sizes.
        stored: Arrays as in a bundle, by the names of `weight_names`.
        values: What each matrix stands for, float64.
    """

    shape: ExpertShape
    stored: dict[str, Array]
    values: dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def random_layer(shape: ExpertShape, seed: int = 0) -> Layer:
    """Weights drawn from a seed."""
    rng = np.random.default_rng(seed)
    stored: dict[str, Array] = {}
    values = {}
    for matrix in MATRICES:
        if matrix.startswith("shared") and not shape.shared_intermediate:
            continue
        size = shape.stored_shape(matrix)
        weights = (rng.standard_normal(size) / math.sqrt(size[-1])).astype(np.float32)
        parts, values[matrix] = _stored(weights, shape.weights.of(matrix), shape.dtype)
        stored |= {matrix + suffix: array for suffix, array in parts.items()}
    return Layer(shape, stored, values)


def _stored(weights: Array, how: WeightFormat | None, dtype: str) -> tuple[dict[str, Array], Array]:
    if how is None:
        raw = to_stored(weights, dtype)
        return {"": raw}, to_float32(raw, dtype).astype(np.float64)
    rows = weights.reshape(-1, weights.shape[-1])
    if how.name == "mxfp4":
        return _mxfp4(weights)
    shared = global_scale(float(np.abs(rows).max()), how, dtype) if how.scale_dtype else None
    units, scales = quantize_rows(rows, how, dtype, shared=shared)
    packed = pack(units, how.dtype).reshape(*weights.shape[:-1], -1).view(carried_dtype(how.dtype))
    parts = {
        "": packed,
        "_scale": scales.reshape(*weights.shape[:-1], -1).view(
            carried_dtype(how.scale_dtype or dtype)
        ),
    }
    if shared is not None:
        parts["_global_scale"] = shared.reshape(1).view(carried_dtype(dtype))
    return parts, expand_rows(units, scales, shared).astype(np.float64).reshape(weights.shape)


def _mxfp4(weights: Array) -> tuple[dict[str, Array], Array]:
    """No recipe writes this one: powers of two as scales, by the definition of the format."""
    grouped = weights.reshape(-1, MXFP4.group)
    exponents = np.floor(np.log2(np.abs(grouped).max(1))).astype(np.int32) - 2
    units = np.clip(grouped / np.exp2(exponents)[:, None], -6, 6).astype(numpy_dtype("float4e2m1"))
    raw = pack(units.reshape(weights.shape), "float4e2m1").reshape(*weights.shape[:-1], -1)
    scales = (exponents + 127).astype(np.uint8).reshape(*weights.shape[:-1], -1)
    values = units.astype(np.float64) * np.exp2(exponents)[:, None]
    return {"": raw, "_scale": scales}, values.reshape(weights.shape)


def tokens(shape: ExpertShape, count: int, seed: int = 1) -> Array:
    """Random tokens [count, D] as they are carried."""
    rng = np.random.default_rng(seed)
    return to_stored(rng.standard_normal((count, shape.hidden)).astype(np.float32), shape.dtype)


def routing(
    shape: ExpertShape, count: int, kind: str = "uniform", seed: int = 2
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Shares [E,N]: `one` has the same experts for all, `few` some, `fewer` at times less than k."""
    rng = np.random.default_rng(seed)
    e, k = shape.experts, shape.top
    shares = np.zeros((e, count), np.float32)
    weights = 1.0 / np.arange(1, e + 1) ** 2 if kind == "skewed" else np.ones(e)
    fixed = rng.choice(e, k, replace=False)
    pool = rng.choice(e, min(e, k + 1), replace=False)
    for token in range(count):
        if kind == "one":
            chosen = fixed
        elif kind == "few":
            chosen = rng.choice(pool, k, replace=False)
        else:
            chosen = rng.choice(e, k, replace=False, p=weights / weights.sum())
        if kind == "fewer":
            chosen = chosen[: rng.integers(0, k + 1)]
        shares[chosen, token] = rng.uniform(0.1, 1.0, len(chosen))
    return shares


def exact(layer: Layer, x: Array, shares: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The layer in float64, without any of the kernels' rounding in between."""
    rows = to_float32(x, layer.shape.dtype).astype(np.float64)
    out = np.zeros(rows.shape)
    for expert in range(layer.shape.experts):
        chosen = np.flatnonzero(shares[expert])
        hidden = np.maximum(rows[chosen] @ layer.values["up"][expert].T, 0) ** 2
        out[chosen] += shares[expert, chosen, None] * (hidden @ layer.values["down"][expert].T)
    if layer.shape.shared_intermediate:
        out += (
            np.maximum(rows @ layer.values["shared_up"].T, 0) ** 2 @ layer.values["shared_down"].T
        )
    return out
