"""Where a tower is cut: for several devices, or so that each piece's build stays under a bound."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.builders.build_cost import LayerBytes, too_little_memory
from twotower.units import format_bytes

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
        if bound is None:
            return ((0, len(weights)),)
        return cut_layers(held, bound)
    cuts = even_layers(weights, segments)
    for first, end in cuts:
        needed = held.build_memory(first, end)
        if bound is not None and needed > bound:
            more = f"{-(-needed // 10**9)}G or more, or cut into more --segments"
            raise too_little_memory(
                f"layers {first} to {end - 1}",
                needed,
                bound,
                more=more,
            )
    return cuts


def cut_layers(held: LayerBytes, bound: int) -> Cuts:
    """As few groups of layers as can be, each built in at most `bound` bytes of memory.

    Greedy from the front, which is optimal. Raises BuildError if a single layer needs more.
    """
    count = len(held.layers)
    groups: list[tuple[int, int]] = []
    start = 0
    for i in range(count):
        needed = held.build_memory(i, i + 1)
        if needed > bound:
            place = {0: " with the embedding", count - 1: " with the head"}.get(i, "")
            more = f"{-(-needed // 10**9)}G or more; a layer is the smallest piece"
            inside = f"{format_bytes(held.between(i, i + 1))} of weights inside need "
            raise too_little_memory(f"layer {i}{place}", needed, bound, more=more, inside=inside)
        if held.build_memory(start, i + 1) > bound:
            groups.append((start, i))
            start = i
    return (*groups, (start, count))


def even_layers(weights: Sequence[int], count: int) -> Cuts:
    """At most `count` groups of layers with about equal bytes, by each layer's middle."""
    total, before = max(sum(weights), 1), 0
    groups: dict[int, list[int]] = {}
    for i, size in enumerate(weights):
        middle = (before + size / 2) / total
        groups.setdefault(min(int(middle * count), count - 1), []).append(i)
        before += size
    return tuple((members[0], members[-1] + 1) for members in groups.values())


def least_bound(held: LayerBytes) -> int:
    """The smallest memory bound under which a graph can be cut."""
    if not held.layers:
        return held.build_memory(0, 0)
    return max(held.build_memory(i, i + 1) for i in range(len(held.layers)))
