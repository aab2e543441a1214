"""Copies that a pass makes before it computes: expanded weights, and keys and values replicated."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from twotower.builders.rtx_program.records import (
    ExpandedWeight,
    Kernel,
    Program,
    ReplicatedCache,
    Tensor,
)

__all__ = ["expanded_weights", "replicated_caches"]

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


def replicated_caches(program: Program) -> tuple[ReplicatedCache, ...]:
    """Kernels that read keys or values and write a larger copy of them to memory for activations."""
    out = []
    for kernel in program.kernels:
        if kernel.is_product or any(_CACHE.fullmatch(program.tensors[n].name) for n in kernel.writes):
            continue
        for cache in (program.tensors[n] for n in kernel.reads):
            if not _CACHE.fullmatch(cache.name):
                continue
            copies = [t for n in kernel.writes if _larger(t := program.tensors[n], cache)]
            out += [ReplicatedCache(kernel.name, kernel.scope, cache.name, t.nbytes) for t in copies]
    return tuple(out)


def _larger(copy: Tensor, cache: Tensor) -> bool:
    """More bytes than the cache at the greatest shapes; where that is unknown, as many positions."""
    if copy.nbytes is not None and cache.nbytes is not None:
        return copy.nbytes > cache.nbytes
    return {d for d in cache.matrix_dims if d > 2} <= set(copy.matrix_dims)
