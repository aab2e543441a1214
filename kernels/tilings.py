"""How a layer is cut for a number of tokens: rows and columns of a block, warps, stages."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import RequestError
from twotower.kernels.shape import MATRICES, MOST_TOKENS, ExpertShape

BUILDABLE_SMS = (80, 86, 89, 90, 100, 120, 121)
"""Compute capabilities cubins are made for."""

_SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_LEAST_SHARED_MEMORY = 99 << 10


@dataclass(frozen=True, slots=True)
class Tier:
    """Token counts up to `tokens` computed by the same kernels, whose names contain its name.

    A block has `rows` pairs, the small side of a product, and `columns` rows of weights.
    """

    name: str
    tokens: int
    rows: int
    columns: int
    warps: int


TIERS = (
    Tier("decode", 8, 16, 64, 4),
    Tier("block", 64, 16, 64, 4),
    Tier("batch", 512, 32, 64, 4),
    Tier("prefill", MOST_TOKENS, 64, 128, 8),
)
"""Ascending. Up to 64 tokens an expert has few pairs, and weights are read once whatever the rows
of a block. From then on blocks have more rows, or weights would be read again for each block."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What a product kernel is compiled with.

    `depth`, the products added up in a step, is the same for every number of tokens; `stages`
    counts steps whose weights are on their way at the same time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tier_for(tokens: int) -> Tier:
    """The tier of a number of tokens; RequestError above the kernels' maximum."""
    for tier in TIERS:
        if tokens <= tier.tokens:
            return tier
    raise RequestError(
        f"{tokens} tokens are more than the expert kernels take in one pass",
        found=f"{tokens} tokens; at most {MOST_TOKENS}",
        do="read prompts in shorter chunks, or fewer rows at a time",
    )


def shared_memory(sm: int) -> int:
    """Bytes of shared memory one program may have on a compute capability."""
    return _SHARED_MEMORY.get(sm, _LEAST_SHARED_MEMORY)


def depth(shape: ExpertShape) -> int:
    """Products added up in a step."""
    return 32 if shape.dtype == "float32" else 64


def tiling(shape: ExpertShape, tier: Tier, sm: int) -> Tiling:
    """How a tier's products are cut on a compute capability.

    One token's experts are some two programs a multiprocessor: each has more steps under way then.
    Decoded weights take registers, and so a block has fewer rows of them.
    """
    large = shared_memory(sm) >= 160 << 10
    stages = (6 if large else 4) if tier.name == "decode" else (4 if large else 3)
    decoded = any(shape.weights.of(matrix) is not None for matrix in MATRICES)
    columns = min(64, tier.columns) if decoded else tier.columns
    return Tiling(tier.rows, columns, depth(shape), tier.warps, stages)
