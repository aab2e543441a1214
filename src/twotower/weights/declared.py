"""The weights a graph declares, and the order they lie in its data file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twotower.config.formats import WeightFormat
from twotower.dtypes import stored_bytes
from twotower.weights.refs import WeightRef, aligned

__all__ = ["Weight", "lay_out"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One initializer of a graph and the checkpoint tensors it is made of.

    The data are the sources' elements one after another (stacking experts along a new first axis is
    exactly that), converted to `dtype`, so a weight can be streamed without ever being whole in
    memory.

    Attributes:
        name: The initializer's name; for a single source the checkpoint's own name.
        shape: Its shape.
        dtype: `float32`, `float16` or `bfloat16`; of a quantized weight's parts any type of
            `twotower.config.formats`.
        sources: Checkpoint tensors in order.
        negated_exp: Store -exp(x) of a (small) source: the Mamba decay rate A of A_log.
        transposed: Store a (small) source with its last axis first: taps of a convolution.
        rows: Only these rows of the (single) source: the first and the one after the last; None for
            all.
        origin: Name of the whole weight this is a part of, as a float graph declares it; empty for
            a weight that is none.
        part: Of a quantized weight `values`, `scale` or `global_scale`; empty for plain numbers.
        format: How the weight is quantized that this is a part of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    negated_exp: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None
    origin: str = ""
    part: str = ""
    format: WeightFormat | None = None

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.dtype, math.prod(self.shape))


def lay_out(weights: Sequence[Weight]) -> dict[str, WeightRef]:
    """Aligned places in one data file, in declaration order: a reader that runs the layers in turn reads forward."""
    out: dict[str, WeightRef] = {}
    end = 0
    for weight in weights:
        out[weight.name] = WeightRef(weight.dtype, weight.shape, aligned(end, weight.nbytes))
        end = out[weight.name].offset + weight.nbytes
    return out
