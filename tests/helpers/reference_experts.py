"""The experts of a layer as their formula says, for tests of what computes them otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from twotower.bundle import ExpertsStep
from twotower.dtypes import numpy_dtype

__all__ = ["reference_experts"]


def reference_experts(
    step: ExpertsStep, x: np.ndarray, shares: np.ndarray, weights: Mapping[str, np.ndarray]
) -> np.ndarray:
    """What the experts of a layer give, token by token.

    Args:
        step: Sizes and types.
        x: [N,D].
        shares: [experts,N] float32.
        weights: By role, as `read_weight` gives them.
    """
    dtype = numpy_dtype(step.dtype)

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(dtype).astype(np.float32)

    def product(matrix: np.ndarray, row: np.ndarray) -> np.ndarray:
        return rounded(matrix @ row)

    full = {
        matrix: _wide(step, matrix, weights)
        for matrix in ("up", "down", "shared_up", "shared_down")
        if matrix in weights
    }
    out = np.zeros(x.shape, dtype)
    for n, row in enumerate(x.astype(np.float32)):
        total = np.zeros(step.hidden, np.float32)
        for e in np.flatnonzero(shares[:, n]):
            hidden = rounded(np.square(np.maximum(product(full["up"][e], row), 0)))
            total += product(full["down"][e], hidden) * shares[e, n]
        if step.shared_intermediate:
            hidden = rounded(np.square(np.maximum(product(full["shared_up"], row), 0)))
            total = rounded(total) + product(full["shared_down"], hidden)
        out[n] = total.astype(dtype)
    return out


def _wide(step: ExpertsStep, matrix: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """A matrix in float32."""
    values = weights[matrix].astype(np.float32)
    if matrix not in step.formats:
        return values
    scale = weights[f"{matrix}_scale"].astype(np.float32)
    if f"{matrix}_global_scale" in weights:
        scale = scale * weights[f"{matrix}_global_scale"].astype(np.float32)
    if scale.ndim < values.ndim:
        return values * scale[:, None]
    return values * np.repeat(scale, values.shape[-1] // scale.shape[-1], axis=-1)
