"""Named static buffers: allocated once for a number of rows, filled in place, bound once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.errors import RequestError
from twotower.runtime.engines.base import Array
from twotower.spec import (
    BLOCK,
    COMMIT_FLOOR,
    CONFIDENCE,
    CONTEXT_LENGTH,
    MASKED_LEFT,
    NEXT_BLOCK,
    NOISE,
    PREDICTED,
    TEMPERATURE,
    THRESHOLD,
    TensorSpec,
    TowerSignature,
)

__all__ = ["DenoiserArrays", "allocate", "allocate_named", "numpy_dtype"]

_NUMPY: dict[str, npt.DTypeLike] = {
    "int64": np.int64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,  # NumPy has no bfloat16: the bits are carried, nothing is computed with them
}

_DENOISER_SMALL = (
    *(BLOCK, CONTEXT_LENGTH, THRESHOLD, COMMIT_FLOOR, TEMPERATURE, NOISE),
    *(NEXT_BLOCK, PREDICTED, CONFIDENCE, MASKED_LEFT),
)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The element type a buffer of a contract dtype is kept in."""
    return np.dtype(_NUMPY[dtype])


def allocate(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    """A C-contiguous buffer of zeros.

    Raises:
        RequestError: there is not enough memory.
    """
    shape = spec.shape(sizes)
    try:
        return np.zeros(shape, numpy_dtype(spec.dtype))
    except MemoryError as e:
        need = int(np.prod(shape, dtype=object)) * numpy_dtype(spec.dtype).itemsize
        raise RequestError(
            f"not enough memory for {sizes.get('B', 1)} row(s) at a context capacity of {sizes.get('T', 0)} tokens",
            found=f"{spec.name} alone needs {need:,} bytes",
            do="lower max_batch, shorten the prompt, or lower max_new_tokens",
        ) from e


def allocate_named(signature: TowerSignature, names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Array]:
    """One buffer for each of these inputs and outputs of a graph."""
    return {name: allocate(signature.tensor(name), sizes) for name in names}


class DenoiserArrays:
    """The denoiser's small inputs and outputs, written and read in place (shapes as in the graph contract).

    Attributes:
        by_name: The same arrays under their graph names.
    """

    __slots__ = (
        "block",
        "by_name",
        "commit_floor",
        "confidence",
        "context_length",
        "masked_left",
        "next_block",
        "noise",
        "predicted",
        "temperature",
        "threshold",
    )

    def __init__(self, signature: TowerSignature, rows: int, block_size: int) -> None:
        a = self.by_name = allocate_named(signature, _DENOISER_SMALL, {"B": rows, "S": block_size})
        self.block, self.context_length = a[BLOCK], a[CONTEXT_LENGTH]
        self.threshold, self.commit_floor = a[THRESHOLD], a[COMMIT_FLOOR]
        self.temperature, self.noise = a[TEMPERATURE], a[NOISE]
        self.next_block, self.predicted = a[NEXT_BLOCK], a[PREDICTED]
        self.confidence, self.masked_left = a[CONFIDENCE], a[MASKED_LEFT]
