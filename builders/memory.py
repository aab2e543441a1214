"""Whether this machine has the memory a build needs, asked before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from twotower.builders.cut import build_memory
from twotower.errors import BuildError

__all__ = ["LayerBytes", "least_bound", "require_build_memory"]


class LayerBytes(Protocol):
    """Weight bytes of a graph: of each layer, of what comes before and after them, and in all."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def before(self) -> int: ...
    @property
    def after(self) -> int: ...
    @property
    def total(self) -> int: ...


def least_bound(graphs: Mapping[str, LayerBytes]) -> int:
    """The smallest `--max-build-memory` under which every graph can be cut."""
    return max(build_memory(_largest_piece(graph)) for graph in graphs.values())


def require_build_memory(graphs: Mapping[str, LayerBytes], *, available: int, bound: int | None) -> None:
    """Refuses a build that the kernel would kill; who gives a bound of their own is trusted with it.

    Args:
        graphs: The graphs to be built whole.
        available: Bytes of memory to be had, 0 if nobody knows.
        bound: `--max-build-memory`.

    Raises:
        BuildError: a graph needs more than there is.
    """
    if bound is not None or not available:
        return
    name = max(graphs, key=lambda n: graphs[n].total)
    needed, least = build_memory(graphs[name].total), least_bound(graphs)
    if needed <= available:
        return
    if least <= available:
        cut = max(available // 10**9, -(-least // 10**8) / 10) if least > available // 10**9 * 10**9 else available // 10**9
        do = f"add --max-build-memory {cut:g}G, which cuts towers into segments"
    else:
        do = (
            f"build on a machine with {least / 1e9:.1f} GB of free memory or more (the largest single layer needs that), "
            f"or add --max-build-memory {-(-least // 10**9)}G to build with swap all the same"
        )
    raise BuildError(
        f"the build of {name} does not fit this machine's memory",
        found=f"about {needed / 1e9:.1f} GB needed at its peak, {available / 1e9:.1f} GB available",
        do=do,
    )


def _largest_piece(graph: LayerBytes) -> int:
    """Bytes of the largest piece that cannot be cut: a layer, with what comes before the first and after the last."""
    if not graph.layers:
        return graph.total
    layers = list(graph.layers)
    layers[0] += graph.before
    layers[-1] += graph.after
    return max(layers)
