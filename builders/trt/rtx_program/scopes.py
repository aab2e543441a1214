"""Which layer a kernel counts for, by the ONNX nodes fused into it, and programs summed up by such scopes for `build.json`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from twotower.builders.trt.rtx_program.records import Kernel, Program

__all__ = ["SHARED", "kind_of", "summarize_programs", "with_scopes"]

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


def summarize_programs(programs: Sequence[Program]) -> dict[str, Any]:
    """What `inspect` shows of an engine, and a build checks."""
    return {"from": "program text", "programs": [_summary(program) for program in programs]}


def _summary(program: Program) -> dict[str, Any]:
    products = [k for k in program.kernels if k.operation == "runtime_fusion"]
    return {
        "profile": program.profile,
        "sms": list(program.sms),
        "kernels": len(program.kernels),
        "by_kind": _by_kind(program),
        "by_operation": _counts(k.operation for k in program.kernels),
        "by_backbone": _counts(k.backbone or "none" for k in products),
        "streams": program.streams,
        "events": program.events,
        "signals": program.signals,
        "waits": program.waits,
        "capturable": program.capturable,
        "scratch": program.scratch,
        "host": program.host,
        "expanded": [{**asdict(w), "stacked": w.stacked} for w in program.expanded],
        "copied": [asdict(c) for c in program.copied],
        "fused": _fused(program),
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _by_kind(program: Program) -> dict[str, dict[str, int]]:
    """Kernels by layer kind: how many layers, kernels of all, and of the layers with fewest and most."""
    kinds: dict[str, list[int]] = {}
    for scope, count in program.by_scope().items():
        kinds.setdefault(kind_of(scope), []).append(count)
    return {kind: {"layers": len(n), "kernels": sum(n), "min": min(n), "max": max(n)} for kind, n in kinds.items()}


def _fused(program: Program) -> dict[str, list[list[str]]]:
    """For the first layer of every kind, the ONNX nodes each of its kernels carries out."""
    first: dict[str, str] = {}
    for kernel in program.kernels:
        first.setdefault(kind_of(kernel.scope), kernel.scope)
    return {scope: [[k.name, *k.nodes] for k in program.kernels if k.scope == scope] for scope in first.values()}
