"""Copies that a pass makes before it computes: of weights, and of keys and values."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from twotower.builders.trt.rtx_program.records import (
    CopiedCache,
    ExpandedWeight,
    Kernel,
    Program,
    Tensor,
)

__all__ = ["copied_caches", "expanded_weights"]

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
            copies = [t.nbytes for t in writes if t.nbytes and t.nbytes % size == 0 and _holds(t, cache)]
            out += [CopiedCache(kernel.name, kernel.scope, cache.name, n, n // size) for n in copies]
    return tuple(out)


def _holds(copy: Tensor, cache: Tensor) -> bool:
    """Whether a tensor has the positions and the width of the heads of a cache [B, heads, T, width]."""
    return set(cache.dims[-2:]) <= set(copy.dims)
