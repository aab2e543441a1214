"""Layers of a program, and the copies of weights, keys and values that a pass makes.

A kernel counts for a layer by the ONNX nodes fused into it.
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

SHARED = "shared"
"""The scope of what several layers share: masks, positions, the modulation of all layers."""

_LAYER = re.compile(r"layers\.\d+\.(\w+)")
_CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")
_MOST_LAYERS = 3  # a residual addition joins the layer before, its own and the next one's norm


def kind_of(scope: str) -> str:
    """The kind of a scope: `moe` of `layers.3.moe`; a part outside of layers is its own kind."""
    found = _LAYER.fullmatch(scope)
    return found[1] if found else scope


def with_scopes(kernels: Sequence[Kernel]) -> tuple[Kernel, ...]:
    """The kernels with their scopes.

    A kernel counts for the layer most of its nodes belong to: the end of one layer and the norm of
    the next are one kernel. One that serves more than three layers counts for the part outside of
    the layers it belongs to, or as shared. One without nodes counts for the first kernel that reads
    what it writes, or for the one before it.
    """
    scopes = [_scope(kernel.nodes) for kernel in kernels]
    for i in reversed(range(len(kernels))):
        for later in range(i + 1, len(kernels)):
            if scopes[i]:
                break
            if not set(kernels[i].writes).isdisjoint(kernels[later].reads):
                scopes[i] = scopes[later]
                break
    last = ""
    for i, scope in enumerate(scopes):
        last = scopes[i] = scope or last or SHARED
    return tuple(replace(k, scope=scope) for k, scope in zip(kernels, scopes, strict=True))


def _scope(nodes: Sequence[str]) -> str:
    layers: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for node in nodes:
        scope = node.rpartition("/")[0]
        if _LAYER.fullmatch(scope):
            layers[scope] += 1
        elif scope:
            parts[scope] += 1
    if 0 < len(layers) <= _MOST_LAYERS:
        return layers.most_common(1)[0][0]
    if parts:
        return parts.most_common(1)[0][0]
    if layers:
        return SHARED
    return "graph" if nodes else ""


def summarize_programs(programs: Sequence[Program]) -> dict[str, Any]:
    """What `inspect` shows of an engine, and a build checks."""
    return {"from": "program text", "programs": [_summary(program) for program in programs]}


def _summary(program: Program) -> dict[str, Any]:
    counts: dict[str, list[int]] = {}  # kernels of each layer, by kind
    fused: dict[str, list[list[str]]] = {}  # by kernel, the ONNX nodes of a kind's first layer
    for scope, count in program.by_scope().items():
        kind = kind_of(scope)
        if kind not in counts:
            fused[scope] = [[k.name, *k.nodes] for k in program.kernels if k.scope == scope]
        counts.setdefault(kind, []).append(count)
    products = [k for k in program.kernels if k.operation == "runtime_fusion"]
    return {
        "profile": program.profile,
        "sms": list(program.sms),
        "kernels": len(program.kernels),
        "by_kind": {
            kind: {
                "layers": len(n),
                "kernels": sum(n),
                "min": min(n),
                "max": max(n),
            }
            for kind, n in counts.items()
        },
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
        "fused": fused,
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def expanded_weights(program: Program, weights: Collection[str]) -> tuple[ExpandedWeight, ...]:
    """Matrices in device memory that are made of weights alone, anew in every pass.

    What is made of weights alone is the same in every pass: dequantized, converted or transposed
    weights. A product that reads them as they are, or fuses their dequantization, writes no such
    thing. A kernel that does other work too is found by its result: fixed in size, of the shape of
    a weight matrix it reads, and read by a product. Vectors are left out: a bias is nothing.
    """
    constant = {r.name for r in program.regions if r.constant}
    scratch = {r.name for r in program.regions if r.place == "accelerator" and not r.constant}
    operands = {name for k in program.kernels if k.is_product for name in k.reads}
    derived: set[str] = set()  # what holds values made of weights alone, at this point of the pass
    out = []
    for kernel in program.kernels:
        sources = []
        for name in dict.fromkeys(kernel.reads):
            tensor = program.tensors[name]
            held = tensor.region in constant if tensor.region else tensor.name in weights
            if held or name in derived:
                sources.append(tensor)
        alone = bool(sources) and len(sources) == len(set(kernel.reads)) and not kernel.is_product
        shapes = [sorted(source.matrix_dims) for source in sources]
        for name in kernel.writes:
            tensor = program.tensors[name]
            (derived.add if alone else derived.discard)(name)
            if tensor.region not in scratch or len(tensor.matrix_dims) < 2 or kernel.is_product:
                continue
            # A weight matrix in another form, beside other work.
            copied = tensor.fixed and sorted(tensor.matrix_dims) in shapes
            if alone or (name in operands and copied):
                out.append(_expanded(kernel, tensor, sources))
    return tuple(out)


def _expanded(kernel: Kernel, tensor: Tensor, weights: Sequence[Tensor]) -> ExpandedWeight:
    labels = []
    for weight in weights:
        if len(weight.matrix_dims) > 1:
            label = f"{weight.dtype} [{', '.join(map(str, weight.dims))}]"
            if not weight.name.startswith("__"):  # the compiler has not given it a name of its own
                label = f"{weight.name} {label}"
            labels.append(label)
    return ExpandedWeight(
        kernel=kernel.name,
        scope=kernel.scope,
        nodes=kernel.nodes,
        weights=tuple(dict.fromkeys(labels)),
        dims=tuple(d for d in tensor.dims if d is not None),
        dtype=tensor.dtype,
        nbytes=tensor.nbytes or 0,
    )


def copied_caches(program: Program) -> tuple[CopiedCache, ...]:
    """Kernels that read keys or values and write all of them again, into scratch memory."""
    out = []
    for kernel in program.kernels:
        writes = [program.tensors[name] for name in kernel.writes]
        if kernel.is_product or any(_CACHE.fullmatch(tensor.name) for tensor in writes):
            continue
        for cache in (program.tensors[name] for name in kernel.reads):
            size = cache.nbytes
            if not size or not _CACHE.fullmatch(cache.name):
                continue
            for copy in writes:
                # It has the positions and the width of the heads of a cache [B, heads, T, width].
                holds = set(cache.dims[-2:]) <= set(copy.dims)
                if holds and copy.nbytes and copy.nbytes % size == 0:
                    times = copy.nbytes // size
                    made = CopiedCache(kernel.name, kernel.scope, cache.name, copy.nbytes, times)
                    out.append(made)
    return tuple(out)
