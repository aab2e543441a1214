"""Where a tower is cut so that the build of each piece stays under a memory bound: plain arithmetic on weight bytes."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.errors import BuildError

__all__ = ["BUILD_MEMORY_BASE", "BUILD_MEMORY_FACTOR", "PROGRAM_BYTES", "build_memory", "cut_layers", "even_layers", "most_weights"]

BUILD_MEMORY_FACTOR = 3.05
"""Peak memory of a build over the weights of its engine: the mapped weights, the builder's copy and the plan.

With the base it lies 2 to 9 % above what was measured on the engines of 0.7 to 4.2 GB of `make engines-real`, and never below; a straight
line through them is 0.25 GB and 3.02 times the weights.
"""

BUILD_MEMORY_BASE = 400_000_000
"""Bytes a build needs besides: the library, its compiler and the graph."""


PROGRAM_BYTES = 70_000_000
"""Disk for the program of one engine and compute capability: that of the published context tower, the largest."""


def build_memory(weights: int) -> int:
    """Peak bytes the build of an engine with so many weight bytes needs."""
    return round(BUILD_MEMORY_BASE + BUILD_MEMORY_FACTOR * weights)


def most_weights(memory: int) -> int:
    """Weight bytes of the largest engine that can be built in so much memory."""
    return max(int((memory - BUILD_MEMORY_BASE) / BUILD_MEMORY_FACTOR), 0)


def cut_layers(layer_bytes: Sequence[int], *, first_extra: int, last_extra: int, most: int) -> tuple[tuple[int, int], ...]:
    """Groups of consecutive layers, as few as can be, of at most `most` weight bytes each.

    Greedy from the front: no cut into fewer groups exists, because each group is as long as it may be.

    Args:
        layer_bytes: Weight bytes of each layer.
        first_extra: Bytes that come with the first layer: the embedding.
        last_extra: Bytes that come with the last layer: the final norm and the head.
        most: Bound of a group.

    Returns:
        For each group its first layer and the one after its last.

    Raises:
        BuildError: a single layer is too large already.
    """
    sizes = list(layer_bytes) or [0]
    sizes[0] += first_extra
    sizes[-1] += last_extra
    groups: list[tuple[int, int]] = []
    start, filled = 0, 0
    for i, size in enumerate(sizes):
        if size > most:
            with_it = {0: " with the embedding", len(sizes) - 1: " with the head"}.get(i, "")
            needed, bound = build_memory(size), build_memory(most)
            raise BuildError(
                f"layer {i}{with_it} cannot be built in so little memory",
                found=f"{size / 1e9:.2f} GB of weights need about {needed / 1e9:.1f} GB, {bound / 1e9:.1f} GB are allowed",
                do=f"raise --max-build-memory to {-(-needed // 10**9)}G or more; a layer is the smallest piece",
            )
        if filled + size > most:
            groups.append((start, i))
            start, filled = i, 0
        filled += size
    return (*groups, (start, len(sizes)))


def even_layers(layer_bytes: Sequence[int], count: int) -> tuple[tuple[int, int], ...]:
    """At most `count` groups of consecutive layers with about as many bytes each: a cut for as many devices.

    A layer goes to the group in which its middle lies when all bytes are divided evenly.
    """
    sizes = list(layer_bytes) or [0]
    total, before = max(sum(sizes), 1), 0
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        middle = (before + size / 2) / total
        groups.setdefault(min(int(middle * count), count - 1), []).append(i)
        before += size
    return tuple((members[0], members[-1] + 1) for members in groups.values())
