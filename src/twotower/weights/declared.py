"""The weights each graph declares, as data, and where they lie in its data file.

Recorder, planner and quantizer read this one list: it needs neither onnx nor a checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from twotower.checkpoint.layout import (
    CheckpointTensor,
    Role,
    Tower,
    expected_tensors,
    layer_tensors,
)
from twotower.config.formats import WeightFormat
from twotower.config.model import ModelConfig
from twotower.dtypes import stored_bytes
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.weights.refs import WeightRef, place

QUANTIZABLE = (
    Role.EMBEDDING,
    Role.HEAD,
    Role.MAMBA,
    Role.ATTENTION,
    Role.ROUTED_EXPERT,
    Role.SHARED_EXPERT,
    Role.MLP,
)
"""Roles of weights that may be quantized. Router, norms and conditioning are small and decide
everything after them: they stay as they are, and so do convolution, dt, A and D of Mamba layers."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One initializer of a graph and the checkpoint tensors it is made of.

    The data are the sources' elements one after another (so experts stack along a new first axis),
    converted to `dtype`; a weight can be streamed without ever being whole in memory.

    Attributes:
        name: The initializer's name; for a single source the checkpoint's own name.
        shape: Its shape.
        dtype: `float32`, `float16` or `bfloat16`; of a quantized weight's parts any type of
            `twotower.config.formats`.
        sources: Checkpoint tensors in order.
        role: What it is for.
        layer: Number of its layer; None for embedding, conditioning, final norm and head.
        negated_exp: Store -exp(x) of a (small) source: the Mamba decay rate A of A_log.
        transposed: Store a (small) source with its last axis first: taps of a convolution.
        rows: First row and the one after the last of the (single) source; None for all.
        origin: Name, in a float graph, of the whole weight this is a part of; else empty.
        part: Of a quantized weight `values`, `scale` or `global_scale`; empty for plain numbers.
        format: How the weight is quantized that this is a part of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    role: Role
    layer: int | None = None
    negated_exp: bool = False
    transposed: bool = False
    rows: tuple[int, int] | None = None
    origin: str = ""
    part: str = ""
    format: WeightFormat | None = None

    @property
    def nbytes(self) -> int:
        return stored_bytes(self.dtype, math.prod(self.shape))

    @property
    def quantizable(self) -> bool:
        """Whether a recipe may name it: embeddings, and matrices of products."""
        matrix = self.role is not Role.MAMBA or self.name.endswith(_MAMBA_MATRICES)
        return matrix and self.role in QUANTIZABLE


_MAMBA_MATRICES = ("in_proj.weight", "out_proj.weight")
_FLOAT32 = (
    "norm.weight",
    "norm_f.weight",
    ".D",
    ".dt_bias",
    ".A_log",
    ".gate.weight",
    ".e_score_correction_bias",
)
"""Ends of the tensors that every graph keeps in float32."""


def declared_weights(
    config: ModelConfig, graph: str, dtype: str, formats: Mapping[str, WeightFormat] | None = None
) -> tuple[Weight, ...]:
    """The weights of a graph in the order it declares them, which is that of its layers.

    `graph` is `context`, `context_head` or `denoiser`; `formats` go by names in a float graph.
    """
    few = formats or {}
    out: list[Weight] = []
    for weight in _float_weights(config, graph, dtype):
        if weight.name in few:
            out += _quantized(weight, few[weight.name], config)
        else:
            out.append(weight)
    return tuple(out)


def _quantized(weight: Weight, how: WeightFormat, config: ModelConfig) -> Iterator[Weight]:
    """Values and scales of a weight; rows of Mamba's first product that make dt stay as they are.

    A matrix with a scale a row has one axis of scales, a stack row-long blocks; groups are blocks.
    """
    if weight.name.endswith("in_proj.weight"):
        rows, columns = weight.shape
        end = rows - config.mamba_num_heads
        name = f"{weight.name}.dt"
        shape = (config.mamba_num_heads, columns)
        yield replace(weight, name=name, shape=shape, rows=(end, rows), origin=name)
        weight = replace(weight, shape=(end, columns), rows=(0, end))
    whole = replace(weight, origin=weight.name, format=how)
    blocked = how.group or len(weight.shape) > 2
    scales = weight.shape[:1]
    if blocked:
        scales = (*weight.shape[:-1], how.groups(weight.shape[-1]))
    kept = how.scale_dtype or weight.dtype
    yield replace(whole, dtype=how.dtype, part="values")
    yield replace(whole, name=f"{weight.name}.scale", shape=scales, dtype=kept, part="scale")
    if how.scale_dtype:
        yield replace(
            whole,
            name=f"{weight.name}.global_scale",
            shape=(),
            part="global_scale",
        )


@lru_cache(maxsize=32)
def _float_weights(config: ModelConfig, graph: str, dtype: str) -> tuple[Weight, ...]:
    sources: dict[str, list[CheckpointTensor]] = {}
    layers: dict[str, int | None] = {}
    for layer, tensor in _tensors(config, graph):
        name = re.sub(r"\.experts\.\d+\.", ".experts.", tensor.name)
        name = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
        sources.setdefault(name, []).append(tensor)
        layers[name] = layer
    out = []
    for name, tensors in sources.items():
        kept = "float32" if name.endswith(_FLOAT32) else dtype
        shape = _shape(name, tensors, config)
        origins = tuple(tensor.name for tensor in tensors)
        weight = Weight(name, shape, kept, origins, tensors[0].role, layers[name])
        if name.endswith("A_log"):
            weight = replace(weight, name=f"{name}.negated_exp", negated_exp=True)
        elif name.endswith("conv1d.weight"):
            weight = replace(weight, name=f"{name}.transposed", transposed=True)
        out.append(weight)
    return tuple(out)


def _shape(name: str, tensors: Sequence[CheckpointTensor], config: ModelConfig) -> tuple[int, ...]:
    """A weight's shape in the graph: experts are stacked, q, k and v lie one below the other."""
    first = tensors[0]
    rows = sum(tensor.shape[0] for tensor in tensors)
    if first.role is Role.ROUTED_EXPERT:
        return (len(tensors), *first.shape)
    if first.role is Role.CONDITIONING and name.endswith("bias"):
        return (1, rows)
    if name.endswith("conv1d.weight"):
        return (first.shape[-1], rows)
    if name.endswith((".dt_bias", ".A_log", ".e_score_correction_bias")):
        return (rows, 1)
    if name.endswith(".D"):
        return (config.n_groups, rows // config.n_groups, 1, 1)
    return (rows, *first.shape[1:])


def _tensors(config: ModelConfig, graph: str) -> Iterator[tuple[int | None, CheckpointTensor]]:
    """The checkpoint's tensors in the order in which a graph reads them, each with its layer."""
    every = expected_tensors(config)
    tower = Tower.DENOISER if graph == DENOISER else Tower.CONTEXT
    if graph != CONTEXT_HEAD:
        yield None, every[f"{tower.value}.embeddings.weight"]
        if graph == DENOISER:
            names = [name for name in every if name.startswith(("t_embedder.", "t_block."))]
            yield from ((None, every[name]) for name in names)
        for layer in range(len(config.layers)):
            if graph == DENOISER:
                yield layer, every[f"scale_shift_tables.{layer}"]
            yield from ((layer, tensor) for tensor in layer_tensors(config, tower, layer))
        yield None, every[f"{tower.value}.norm_f.weight"]
    if graph != CONTEXT:
        yield None, every[tower.head]


def lay_out(weights: Sequence[Weight]) -> dict[str, WeightRef]:
    """Places in one data file, in declaration order: running layer by layer reads forward."""
    return place((w.name, w.dtype, w.shape) for w in weights)
