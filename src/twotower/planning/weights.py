"""Weight bytes of the three graphs by layer and by kind: sums over the weights they declare."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from twotower.builders.build_cost import LayerBytes
from twotower.checkpoint.layout import Role
from twotower.config.formats import WeightFormat, product_block, stored_format
from twotower.config.model import ModelConfig
from twotower.dtypes import item_bytes
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.weights.declared import Weight, declared_weights, lay_out

EXPERT_FORMATS = ("int8", "fp8", "int4", "nvfp4")
"""What `--experts` can plan: formats of `twotower quantize` for the routed experts."""

EXPERT_RECIPES: Mapping[str, str] = MappingProxyType(
    {"int8": "int8", "fp8": "fp8", "int4": "int4-experts", "nvfp4": "nvfp4-experts"}
)
"""The recipe that stores the experts so; `int8` and `fp8` quantize the inputs of products too,
which TensorRT needs to fuse them."""

AS_STORED = ("int4", "int8")
"""What products of `ort-cpu` read as it is stored, in the engine's own order and with a float32
scale for each block."""

Formats = tuple[tuple[str, str], ...]
"""Quantized layer kinds, each with the name of its format."""

_GRAPHS = (CONTEXT, CONTEXT_HEAD, DENOISER)


@dataclass(frozen=True, slots=True)
class GraphWeights:
    """Weight bytes of one graph, also by what they are for and by type (format with scales).

    `stored` is the data file's size. `held` are those that an engine of TensorRT holds, because it
    takes quantized weights as constants only (kernels take them as they lie); `packed` those of
    them in 4 bits, scales included.
    """

    all: LayerBytes
    by_kind: Mapping[str, int]
    by_dtype: Mapping[str, int]
    stored: int
    held: LayerBytes
    packed: int

    @property
    def layers(self) -> tuple[int, ...]:
        return self.all.layers

    @property
    def total(self) -> int:
        return self.all.total

    def to_json(self) -> dict[str, Any]:
        """The sums that a plan prints."""
        by_kind, by_dtype = dict(self.by_kind), dict(self.by_dtype)
        return {"total": self.total, "by_kind": by_kind, "by_dtype": by_dtype}

    @property
    def read(self) -> int:
        """Bytes a pass reads: everything but the embedding, of which it gathers rows."""
        return self.total - self.by_kind.get(Role.EMBEDDING.value, 0)


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of the checkpoint's tensors if all are in the config's dtype."""
    counts = weight_counts(config).values()
    return sum(sum(kinds.values()) for kinds in counts) * item_bytes(config.dtype)


@lru_cache(maxsize=64)
def weight_counts(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    """Weights of each graph by what they are for: numbers, not bytes."""
    out: dict[str, Counter[str]] = {name: Counter() for name in _GRAPHS}
    for name, counts in out.items():
        for weight in declared_weights(config, name, config.dtype):
            counts[weight.role.value] += math.prod(weight.shape)
    return MappingProxyType(out)


@lru_cache(maxsize=64)
def graph_weights(
    config: ModelConfig,
    dtype: str,
    formats: Formats = (),
    rounded: tuple[str, ...] = (),
    *,
    outside: tuple[str, ...] = (),
) -> Mapping[str, GraphWeights]:
    """Weight bytes of every graph.

    `formats` are as `twotower quantize` stores them; products of kinds in `rounded` are quantized
    on both sides; no engine holds kinds in `outside`, whatever their format.
    """
    out = {}
    for name in _GRAPHS:
        weights = _declared(config, name, dtype, formats, rounded)
        by_kind: Counter[str] = Counter()
        by_dtype: Counter[str] = Counter()
        for weight in weights:
            by_kind[weight.role.value] += weight.nbytes
            by_dtype[weight.format.name if weight.format else weight.dtype] += weight.nbytes
        held = [w for w in weights if w.format and w.role.value not in outside]
        packed = [w for w in held if w.format and w.format.bits == 4]
        layers = 0 if name == CONTEXT_HEAD else len(config.layers)
        values = (w.nbytes for w in packed if w.part == "values")
        out[name] = GraphWeights(
            all=_by_layer(weights, layers),
            by_kind=MappingProxyType(by_kind),
            by_dtype=MappingProxyType(by_dtype),
            stored=max(ref.end for ref in lay_out(weights).values()),
            held=_by_layer(held, layers, largest_packed=max(values, default=0)),
            packed=sum(w.nbytes for w in packed),
        )
    return MappingProxyType(out)


def _declared(
    config: ModelConfig, graph: str, dtype: str, formats: Formats, rounded: tuple[str, ...] = ()
) -> tuple[Weight, ...]:
    """The weights of a graph whose layer kinds are quantized so."""
    names, few = dict(formats), dict[str, WeightFormat]()
    for weight in declared_weights(config, graph, dtype):
        kind = weight.role.value
        if weight.quantizable and kind in names:
            few[weight.name] = stored_format(
                names[kind],
                weight.shape[-1],
                stacked=weight.role is Role.ROUTED_EXPERT,
                rounded_input=kind in rounded,
            )
    return declared_weights(config, graph, dtype, few)


def _by_layer(weights: Iterable[Weight], layers: int, *, largest_packed: int = 0) -> LayerBytes:
    sums = [0] * layers
    before = after = 0
    for weight in weights:
        if weight.layer is not None:
            sums[weight.layer] += weight.nbytes
        elif weight.role in (Role.HEAD, Role.NORM):
            after += weight.nbytes
        else:
            before += weight.nbytes
    return LayerBytes(tuple(sums), before, after, largest_packed)


@lru_cache(maxsize=64)
def cpu_bytes(
    config: ModelConfig, dtype: str, formats: Formats = (), *, as_stored: bool = True
) -> Mapping[str, int]:
    """Bytes an `ort-cpu` engine writes beside each graph of a bundle in `dtype`.

    Half precision is widened to float32 and 4-bit floats expanded. What is float32 in the bundle
    stays there, and so do quantized weights that products do not read as they are stored, but their
    scales are widened. `as_stored`: products read integers so; not in the standard dialect.
    """
    out: Counter[str] = Counter()
    for graph in _GRAPHS:
        block = 0
        for weight in _declared(config, graph, dtype, formats):
            if weight.part == "values" and as_stored:
                block = _product_block(weight, graph)  # of its scales, which follow, too
            count = math.prod(weight.shape)
            if weight.format and weight.format.name == "nvfp4":
                out[graph] += 4 * count if weight.part == "values" else 0
            elif weight.format and block:
                out[graph] += weight.nbytes + 4 * count // block if weight.part == "values" else 0
            elif weight.dtype in ("float16", "bfloat16"):
                out[graph] += 4 * count
    return MappingProxyType({graph: out[graph] for graph in _GRAPHS})


def _product_block(weight: Weight, graph: str) -> int:
    """Weights that share a scale in a product of `ort-cpu`, 0 if it cannot read them as stored."""
    how = weight.format
    if how is None or how.name not in AS_STORED or weight.role is Role.EMBEDDING:
        return 0
    columns, stacked = weight.shape[-1], weight.role is Role.ROUTED_EXPERT
    return product_block(
        columns,
        how.group or columns,
        even_rows=stacked or graph == DENOISER,
    )
