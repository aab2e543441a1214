"""Where weights lie in a data file: what writers lay out and readers go by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from twotower.dtypes import stored_bytes

PAGE, LINE, LARGE = 4096, 64, 1 << 20
"""Offsets of weights in a data file: a large weight starts on a page, so that it can be mapped on
its own, any other on a cache line."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Where one weight lies in a data file, from byte `offset` on.

    `dtype` is `float32`, `float16` or `bfloat16`; of a quantized weight `int8`, `float8e4m3fn`,
    `int4` or `float4e2m1`; in an engine's own file also `uint8` or `uint4`.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.dtype, math.prod(self.shape))

    @property
    def end(self) -> int:
        """The byte after its last."""
        return self.offset + self.nbytes

    @property
    def half_precision(self) -> bool:
        """Whether it is widened where a machine has no arithmetic for its type."""
        return self.dtype in ("float16", "bfloat16")

    def rows(self, first: int, end: int) -> WeightRef:
        """Rows [first, end) of it as a matrix: all axes but the last are counted through."""
        columns = self.shape[-1]
        before = stored_bytes(self.dtype, first * columns)
        return WeightRef(
            self.dtype,
            (end - first, columns),
            self.offset + before,
        )

    def split(self, count: int) -> Iterator[WeightRef]:
        """All rows of it as a matrix, `count` at a time."""
        total = math.prod(self.shape[:-1])
        for first in range(0, total, count):
            yield self.rows(first, min(first + count, total))


def aligned(offset: int, nbytes: int) -> int:
    """The next offset a weight of so many bytes may start at."""
    step = PAGE if nbytes >= LARGE else LINE
    return -(-offset // step) * step


def place(weights: Iterable[tuple[str, str, tuple[int, ...]]]) -> dict[str, WeightRef]:
    """Aligned places in one data file for weights of (name, dtype, shape), in their order."""
    out: dict[str, WeightRef] = {}
    end = 0
    for name, dtype, shape in weights:
        nbytes = stored_bytes(dtype, math.prod(shape))
        out[name] = WeightRef(dtype, shape, aligned(end, nbytes))
        end = out[name].end
    return out
