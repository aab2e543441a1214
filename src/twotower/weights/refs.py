"""Where one weight lies in a data file: what the exporter lays out, and every reader of a bundle goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twotower.dtypes import stored_bytes

__all__ = ["LARGE", "LINE", "PAGE", "WeightRef", "aligned"]

PAGE, LINE, LARGE = 4096, 64, 1 << 20
"""Offsets of weights in a data file: a large weight starts on a page, so that it can be mapped on
its own, any other on a cache line."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Where one weight lies in a data file.

    Attributes:
        dtype: `float32`, `float16` or `bfloat16`; of a quantized weight `int8`, `float8e4m3fn`,
            `int4` or `float4e2m1`; in an engine's own file also `uint8` or `uint4`.
        shape: Its shape.
        offset: First byte.
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
    def narrow(self) -> bool:
        """Whether it is of half width, and so widened where a machine has no arithmetic for that."""
        return self.dtype in ("float16", "bfloat16")


def aligned(offset: int, nbytes: int) -> int:
    """The next offset a weight of so many bytes may start at."""
    step = PAGE if nbytes >= LARGE else LINE
    return -(-offset // step) * step
