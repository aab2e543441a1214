"""What a program does, layer by layer: the layer a kernel counts for, copies that a pass makes before it computes, and sums of both.

A kernel counts for a layer by the ONNX nodes fused into it. Copies are of weights, and of keys and
values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from twotower.builders.trt.rtx_program.program import (
    CopiedCache,
    ExpandedWeight,
    Kernel,
    Program,
    Tensor,
)

__all__ = [
    "SHARED",
    "copied_caches",
    "expanded_weights",
    "kind_of",
    "summarize_programs",
    "with_scopes",
]

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
    the next are one kernel. One that serves more than three layers counts for the part outside of
    the layers it belongs to, or as shared. One without nodes counts for the first kernel that reads
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
    return {
        kind: {"layers": len(n), "kernels": sum(n), "min": min(n), "max": max(n)}
        for kind, n in kinds.items()
    }


def _fused(program: Program) -> dict[str, list[list[str]]]:
    """For the first layer of every kind, the ONNX nodes each of its kernels carries out."""
    first: dict[str, str] = {}
    for kernel in program.kernels:
        first.setdefault(kind_of(kernel.scope), kernel.scope)
    return {
        scope: [[k.name, *k.nodes] for k in program.kernels if k.scope == scope]
        for scope in first.values()
    }


_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")


def expanded_weights(program: Program, weights: Collection[str]) -> tuple[ExpandedWeight, ...]:
    """Matrices in device memory that are made of weights alone, anew in every pass.

    What is made of weights alone is the same in every pass: dequantized, converted or transposed
    weights. A product that reads them as they are, or fuses their dequantization, writes no such
    thing. A kernel that does other work too is found by its result: fixed in size, of the shape of
    a weight matrix it reads, and read by a product. Vectors are left out: a bias is nothing.

    Args:
        program: The program.
        weights: Names of the inputs that are weights.
    """
    constant = {r.name for r in program.regions if r.constant}
    scratch = {r.name for r in program.regions if r.place == "accelerator" and not r.constant}
    operands = {name for k in program.kernels if k.is_product for name in k.reads}
    derived: set[str] = set()  # what holds values made of weights alone, at this point of the pass
    out = []
    for kernel in program.kernels:
        reads = {name: program.tensors[name] for name in kernel.reads}
        sources = [t for n, t in reads.items() if n in derived or _is_weight(t, constant, weights)]
        alone = bool(sources) and len(sources) == len(reads) and not kernel.is_product
        for name in kernel.writes:
            tensor = program.tensors[name]
            (derived.add if alone else derived.discard)(name)
            if tensor.region not in scratch or len(tensor.matrix_dims) < 2 or kernel.is_product:
                continue
            if alone or (name in operands and _is_copy(tensor, sources)):
                out.append(_expanded(kernel, tensor, sources))
    return tuple(out)


def _is_weight(tensor: Tensor, constant: Collection[str], weights: Collection[str]) -> bool:
    return tensor.region in constant if tensor.region else tensor.name in weights


def _is_copy(tensor: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether a result is a weight matrix in another form."""
    shape = sorted(tensor.matrix_dims)
    return tensor.fixed and any(shape == sorted(weight.matrix_dims) for weight in weights)


def _expanded(kernel: Kernel, tensor: Tensor, weights: Sequence[Tensor]) -> ExpandedWeight:
    dims = tuple(d for d in tensor.dims if d is not None)
    return ExpandedWeight(
        kernel=kernel.name,
        scope=kernel.scope,
        nodes=kernel.nodes,
        weights=tuple(dict.fromkeys(_label(w) for w in weights if len(w.matrix_dims) > 1)),
        dims=dims,
        dtype=tensor.dtype,
        nbytes=tensor.nbytes or 0,
    )


def _label(weight: Tensor) -> str:
    """A weight's name, or its type and shape where the compiler gave it a name of its own."""
    shape = f"{weight.dtype} [{', '.join(map(str, weight.dims))}]"
    return shape if weight.name.startswith("__") else f"{weight.name} {shape}"


def copied_caches(program: Program) -> tuple[CopiedCache, ...]:
    """Kernels that read keys or values and write all of them again, into memory for activations."""
    out = []
    for kernel in program.kernels:
        writes = [program.tensors[name] for name in kernel.writes]
        if kernel.is_product or any(_CACHE.fullmatch(tensor.name) for tensor in writes):
            continue
        for cache in (program.tensors[name] for name in kernel.reads):
            size = cache.nbytes
            if not size or not _CACHE.fullmatch(cache.name):
                continue
            copies = [
                t.nbytes for t in writes if t.nbytes and t.nbytes % size == 0 and _holds(t, cache)
            ]
            out += [
                CopiedCache(kernel.name, kernel.scope, cache.name, n, n // size) for n in copies
            ]
    return tuple(out)


def _holds(copy: Tensor, cache: Tensor) -> bool:
    """Whether a tensor has the positions and the width of the heads of a cache [B, heads, T, width]."""
    return set(cache.dims[-2:]) <= set(copy.dims)
