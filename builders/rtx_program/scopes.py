"""Which layer a kernel counts for, by the ONNX nodes fused into it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from twotower.builders.rtx_program.records import Kernel

__all__ = ["SHARED", "kind_of", "with_scopes"]

SHARED = "shared"
"""The scope of what several layers share: masks, positions, the modulation of all layers at once."""

_LAYER = re.compile(r"layers\.\d+\.(\w+)")
_MOST_LAYERS = 3  # a residual addition joins the layer before, its own and the next one's norm


def kind_of(scope: str) -> str:
    """The kind of a scope: `moe` of `layers.3.moe`; a part outside of the layers is its own kind."""
    found = _LAYER.fullmatch(scope)
    return found[1] if found else scope


def with_scopes(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """The kernels with their scopes.

    A kernel counts for the layer most of its nodes belong to: the end of one layer and the norm of
    the next are one kernel. One that serves more than three layers counts for the part outside of the
    layers it belongs to, or as shared. One without nodes counts for the first kernel that reads
    what it writes.
    """
    scopes = [_scope(kernel.nodes) for kernel in kernels]
    for i in reversed(range(len(kernels))):
        scopes[i] = scopes[i] or _reader(kernels, scopes, i)
    last = ""
    for i, scope in enumerate(scopes):
        last = scopes[i] = scope or last or SHARED
    return tuple(replace(k, scope=scope) for k, scope in zip(kernels, scopes, strict=True))


def _scope(nodes: Sequence[str]) -> str:
    counts = Counter(node.rpartition("/")[0] for node in nodes)
    layers = [scope for scope in counts if _LAYER.fullmatch(scope)]
    parts = Counter({scope: n for scope, n in counts.items() if scope not in layers and scope})
    if len(layers) > _MOST_LAYERS:
        return parts.most_common(1)[0][0] if parts else SHARED
    if layers:
        return max(layers, key=counts.__getitem__)
    return parts.most_common(1)[0][0] if parts else "graph" if nodes else ""


def _reader(kernels: Sequence[Kernel], scopes: Sequence[str], i: int) -> str:
    """The scope of the first later kernel that reads what kernel `i` writes."""
    written = set(kernels[i].writes)
    later = range(i + 1, len(kernels))
    return next((scopes[j] for j in later if written & set(kernels[j].reads)), "")
