"""Ranges and histograms of activations, gathered a pass at a time in memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.errors import CalibrationError

__all__ = [
    "BINS",
    "CONTEXT_BUCKETS",
    "DENOISER_BUCKETS",
    "TowerStatistics",
    "bin_edges",
    "bucket_of",
]

CONTEXT_BUCKETS = ("text",)
DENOISER_BUCKETS = ("0", *(f"{i}/8" for i in range(1, 9)))
"""Masked fraction t of the block: 0 is a finished block, i/8 everything in ((i-1)/8, i/8]."""

_LOWEST, _HIGHEST, _PER_OCTAVE = -24, 24, 8
BINS = 1 + (_HIGHEST - _LOWEST) * _PER_OCTAVE
"""Bins of a histogram of magnitudes: one for everything below 2^-24, then eight of equal width in every octave up to 2^24."""

_FIRST_KEY = (127 + _LOWEST) * _PER_OCTAVE
_INFINITE = 0x7F800000


def bin_edges() -> npt.NDArray[np.float64]:
    """Lower edge of every bin and the upper edge of the last, [BINS + 1]."""
    octaves = np.exp2(np.arange(_LOWEST, _HIGHEST, dtype=np.float64))
    inner = (octaves[:, None] * (1 + np.arange(_PER_OCTAVE) / _PER_OCTAVE)).reshape(-1)
    return np.concatenate(([0.0], inner, [2.0**_HIGHEST]))


def bucket_of(masked: int, block_size: int) -> int:
    """The bucket of `DENOISER_BUCKETS` for a block with so many masks."""
    return -(-8 * masked // block_size)


@dataclass(slots=True)
class TowerStatistics:
    """What was seen of the inputs of a tower's products.

    Attributes:
        names: Of each of the N inputs the first weight it is multiplied with.
        buckets: Names of the K buckets.
        histogram: [N,K,BINS] int64 counts of magnitudes.
        minimum: [N,K] float32, infinity where nothing was seen, and
        maximum: [N,K] float32, minus infinity there.
        squares: [N,K] float64 sums of squares.
    """

    names: tuple[str, ...]
    buckets: tuple[str, ...]
    histogram: npt.NDArray[np.int64]
    minimum: npt.NDArray[np.float32]
    maximum: npt.NDArray[np.float32]
    squares: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, names: Sequence[str], buckets: Sequence[str]) -> TowerStatistics:
        """Nothing seen yet."""
        size = (len(names), len(buckets))
        infinite = np.full(size, np.inf, np.float32)
        return cls(
            tuple(names),
            tuple(buckets),
            np.zeros((*size, BINS), np.int64),
            infinite,
            -infinite,
            np.zeros(size),
        )

    @property
    def count(self) -> npt.NDArray[np.int64]:
        """Values seen, [N,K]."""
        return np.asarray(self.histogram.sum(axis=-1))

    @property
    def greatest(self) -> npt.NDArray[np.float32]:
        """Greatest magnitude, [N,K]; NaN where nothing was seen."""
        out = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return np.where(self.count > 0, out, np.float32(np.nan))

    def add(self, index: int, bucket: int, x: npt.NDArray[Any]) -> None:
        """Takes values of one input in.

        The bin is read off the bits of the number: exponent and the first three digits behind the
        point.

        Raises:
            CalibrationError: NaN or infinity among them.
        """
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        if not flat.size:
            return
        bits = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
        if int(bits.max()) >= _INFINITE:
            raise CalibrationError(
                f"the input of {self.names[index]} is not finite",
                found=f"NaN or infinity at masked fraction {self.buckets[bucket]}",
                do="check the bundle with `twotower doctor BUNDLE`; half-width models overflow where float32 does not",
            )
        keys = np.clip((bits >> np.uint32(20)).astype(np.int64) - _FIRST_KEY + 1, 0, BINS - 1)
        self.histogram[index, bucket] += np.bincount(keys, minlength=BINS)
        self.minimum[index, bucket] = min(self.minimum[index, bucket], flat.min())
        self.maximum[index, bucket] = max(self.maximum[index, bucket], flat.max())
        self.squares[index, bucket] += float(np.square(flat, dtype=np.float64).sum())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, as they are stored."""
        return {
            "histogram": self.histogram,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "squares": self.squares,
        }
