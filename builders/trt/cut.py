"""Where a tower is cut: for several devices, or so that the build of each piece stays under a memory bound."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.build_cost import LayerBytes, build_memory
from twotower.errors import BuildError

__all__ = ["cut_layers", "even_layers", "least_bound", "tower_cuts"]

Cuts = tuple[tuple[int, int], ...]
"""Groups of consecutive layers: for each its first layer and the one after its last."""


def tower_cuts(
    weights: Sequence[int], held: LayerBytes, *, segments: int = 1, bound: int | None = None
) -> Cuts:
    """The engines a graph becomes.

    Args:
        weights: Bytes of all weights of each layer; empty for a graph without layers.
        held: Those that engines hold.
        segments: Engines to cut into, for as many devices.
        bound: Bytes of memory the build of one may need; with one segment it decides the cut.

    Raises:
        BuildError: a piece needs more than `bound`.
    """
    if not weights:
        return ((0, 0),)
    if segments == 1:
        return ((0, len(weights)),) if bound is None else cut_layers(held, bound)
    cuts = even_layers(weights, segments)
    for first, end in cuts:
        needed = build_memory(
            held.between(first, end), end - first, largest_packed=held.largest_packed
        )
        if bound is not None and needed > bound:
            raise BuildError(
                f"layers {first} to {end - 1} cannot be built in so little memory",
                found=f"about {needed / 1e9:.1f} GB needed, {bound / 1e9:.1f} GB are allowed",
                do=f"raise --max-build-memory to {-(-needed // 10**9)}G or more, or cut into more --segments",
            )
    return cuts


def cut_layers(held: LayerBytes, bound: int) -> Cuts:
    """As few groups as can be of layers whose build needs at most `bound` bytes of memory.

    Greedy from the front: no cut into fewer groups exists, because each group is as long as it may
    be.

    Raises:
        BuildError: a single layer needs more already.
    """
    sizes = _with_ends(held)
    groups: list[tuple[int, int]] = []
    start, filled = 0, 0
    for i, size in enumerate(sizes):
        needed = build_memory(size, 1, largest_packed=held.largest_packed)
        if needed > bound:
            with_it = {0: " with the embedding", len(sizes) - 1: " with the head"}.get(i, "")
            raise BuildError(
                f"layer {i}{with_it} cannot be built in so little memory",
                found=f"{size / 1e9:.2f} GB of weights inside need about {needed / 1e9:.1f} GB, {bound / 1e9:.1f} GB are allowed",
                do=f"raise --max-build-memory to {-(-needed // 10**9)}G or more; a layer is the smallest piece",
            )
        if build_memory(filled + size, i + 1 - start, largest_packed=held.largest_packed) > bound:
            groups.append((start, i))
            start, filled = i, 0
        filled += size
    return (*groups, (start, len(sizes)))


def even_layers(weights: Sequence[int], count: int) -> Cuts:
    """At most `count` groups of layers with about as many bytes each: a cut for as many devices.

    A layer goes to the group in which its middle lies when all bytes are divided evenly.
    """
    sizes = list(weights) or [0]
    total, before = max(sum(sizes), 1), 0
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        middle = (before + size / 2) / total
        groups.setdefault(min(int(middle * count), count - 1), []).append(i)
        before += size
    return tuple((members[0], members[-1] + 1) for members in groups.values())


def least_bound(held: LayerBytes) -> int:
    """The smallest memory bound under which a graph can be cut."""
    if not held.layers:
        return build_memory(held.total, 0, largest_packed=held.largest_packed)
    return build_memory(max(_with_ends(held)), 1, largest_packed=held.largest_packed)


def _with_ends(held: LayerBytes) -> list[int]:
    """Bytes of each layer, the first with what comes before it and the last with what comes after."""
    sizes = list(held.layers) or [0]
    sizes[0] += held.before
    sizes[-1] += held.after
    return sizes
