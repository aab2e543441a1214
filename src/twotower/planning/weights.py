"""Weight bytes of the three graphs by layer and by kind, from the config alone, in few bits too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from twotower.builders.build_cost import LayerBytes
from twotower.checkpoint.layout import CheckpointTensor, Role, Tower, expected_tensors
from twotower.config.formats import FORMATS, product_block, stored_format
from twotower.config.model import ModelConfig
from twotower.dtypes import item_bytes, stored_bytes
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.weights.refs import aligned

__all__ = [
    "AS_STORED",
    "EXPERT_FORMATS",
    "EXPERT_RECIPES",
    "Formats",
    "GraphWeights",
    "checkpoint_bytes",
    "cpu_bytes",
    "graph_weights",
    "weight_counts",
]

_FLOAT32 = (
    "norm.weight",
    "norm_f.weight",
    ".D",
    ".dt_bias",
    ".A_log",
    ".gate.weight",
    ".e_score_correction_bias",
)
"""Ends of the names that a graph keeps in float32 whatever the model's dtype."""


EXPERT_FORMATS = ("int8", "fp8", "int4", "nvfp4")
"""What `--experts` can plan: formats of `twotower quantize` for the routed experts."""

EXPERT_RECIPES: Mapping[str, str] = MappingProxyType(
    {"int8": "int8", "fp8": "fp8", "int4": "int4-experts", "nvfp4": "nvfp4-experts"}
)
"""The recipe that stores the experts so; `int8` and `fp8` round the inputs of products too, which TensorRT needs to fuse them."""

Formats = tuple[tuple[str, str], ...]
"""Layer kinds in few bits, each with the name of its format."""


@dataclass(frozen=True, slots=True)
class GraphWeights:
    """Weight bytes of one graph.

    Attributes:
        layers: Of each layer.
        before: Of the embedding and, in the denoiser, the conditioning's own products.
        after: Of the final norm and the head.
        by_kind: The same bytes by what the weights are for.
        by_dtype: The same bytes by element type; few-bit weights go by the format's name, scales
            included.
        stored: Bytes of the data file: every weight starts on a page, a small one on a cache line.
        held: Those that an engine of TensorRT holds, because it takes few bits as constants only;
            kernels take them as they lie.
        packed: Of these held the ones in 4 bits, scales included.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    by_kind: Mapping[str, int]
    by_dtype: Mapping[str, int]
    stored: int
    held: LayerBytes
    packed: int

    @property
    def total(self) -> int:
        return sum(self.layers) + self.before + self.after

    def between(self, first: int, end: int) -> int:
        """Bytes of the layers [first, end), with what comes before and after them."""
        ends = (self.before if first == 0 else 0) + (self.after if end == len(self.layers) else 0)
        return sum(self.layers[first:end]) + ends

    @property
    def read(self) -> int:
        """Bytes a pass reads: everything but the embedding, of which it gathers rows."""
        return self.total - self.by_kind.get(Role.EMBEDDING.value, 0)


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of the checkpoint's tensors if all are in the config's dtype."""
    return sum(math.prod(t.shape) for t in expected_tensors(config).values()) * item_bytes(
        config.dtype
    )


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

    Args:
        config: The model.
        dtype: Element type of the graphs.
        formats: Layer kinds in few bits, as `twotower quantize` stores them.
        rounded: Kinds whose products read few bits on both sides.
        outside: Kinds that no engine holds, whatever their format.
    """
    few = dict(formats)
    sums = {name: _Sums(len(config.layers)) for name in (CONTEXT, CONTEXT_HEAD, DENOISER)}
    stacks: Counter[tuple[str, str, str]] = Counter()
    packed: Counter[tuple[str, str]] = Counter()
    for tensor in expected_tensors(config).values():
        graph, stack = _graph_of(tensor), _stack_of(tensor)
        kind = tensor.role.value
        for size, kept in _stored(
            tensor, config, dtype, few.get(kind), rounded_input=kind in rounded
        ):
            sums[graph].add(tensor, size, kept, inside=kind not in outside)
            stacks[graph, stack, kept] += size
            if _is_packed(kept) and kind not in outside:
                packed[graph, stack] += stored_bytes(FORMATS[kept].dtype, _count(tensor, config))
    for (graph, _, _), size in stacks.items():
        sums[graph].stored += aligned(size, size)
    for (graph, _), size in packed.items():
        sums[graph].largest_packed = max(sums[graph].largest_packed, size)
    return MappingProxyType(
        {name: s.frozen(with_layers=name != CONTEXT_HEAD) for name, s in sums.items()}
    )


AS_STORED = ("int4", "int8")
"""What products of `ort-cpu` read as it is stored, in the engine's own order and with a float32 scale for each block."""


@lru_cache(maxsize=64)
def cpu_bytes(
    config: ModelConfig, dtype: str, formats: Formats = (), *, as_stored: bool = True
) -> Mapping[str, int]:
    """Bytes an `ort-cpu` engine writes beside each graph.

    Half-width weights are widened to float32 and 4-bit floats expanded. What is float32 in the
    bundle stays there, and so do quantized weights that products do not read as they are stored;
    their scales are widened.

    Args:
        config: The model.
        dtype: Of the bundle.
        formats: Layer kinds in few bits.
        as_stored: Whether products read integers as they are stored; not in the standard dialect.
    """
    out: Counter[str] = Counter({CONTEXT: 0, CONTEXT_HEAD: 0, DENOISER: 0})
    few = dict(formats)
    for tensor in expected_tensors(config).values():
        how = few.get(tensor.role.value)
        block = _product_block(tensor, how) if as_stored else 0
        for size, kept in _stored(tensor, config, dtype, how):
            if kept in ("float16", "bfloat16"):
                out[_graph_of(tensor)] += 2 * size
            elif kept == "nvfp4":
                out[_graph_of(tensor)] += 4 * math.prod(tensor.shape)
            elif kept == how:
                count = _count(tensor, config)
                values = stored_bytes(FORMATS[kept].dtype, count)
                if block:
                    out[_graph_of(tensor)] += values + 4 * count // block
                elif dtype != "float32":
                    out[_graph_of(tensor)] += 2 * (size - values)
    return MappingProxyType(dict(out))


def _product_block(tensor: CheckpointTensor, how: str | None) -> int:
    """Weights that share a scale in a product of `ort-cpu`; 0 where it does not read the weight as it is stored."""
    if how not in AS_STORED or tensor.role is Role.EMBEDDING:
        return 0
    columns, stacked = tensor.shape[-1], tensor.role is Role.ROUTED_EXPERT
    group = stored_format(how, columns, stacked=stacked).group or columns
    return product_block(columns, group, even_rows=stacked or _graph_of(tensor) == DENOISER)


@lru_cache(maxsize=64)
def weight_counts(config: ModelConfig) -> Mapping[str, Mapping[str, int]]:
    """Weights of each graph by what they are for: numbers, not bytes."""
    out: dict[str, Counter[str]] = {name: Counter() for name in (CONTEXT, CONTEXT_HEAD, DENOISER)}
    for tensor in expected_tensors(config).values():
        out[_graph_of(tensor)][tensor.role.value] += math.prod(tensor.shape)
    return MappingProxyType({name: MappingProxyType(counts) for name, counts in out.items()})


def _count(tensor: CheckpointTensor, config: ModelConfig) -> int:
    """Weights of a tensor that are quantized where its kind is."""
    rows = tensor.shape[0] - (
        config.mamba_num_heads if tensor.name.endswith("in_proj.weight") else 0
    )
    return rows * tensor.shape[-1]


def _is_packed(name: str) -> bool:
    """Whether a type is a format of 4 bits."""
    return name in FORMATS and FORMATS[name].bits == 4


class _Places:
    """Bytes by layer while they are added up."""

    def __init__(self, layers: int) -> None:
        self.layers = [0] * layers
        self.before = self.after = 0

    def add(self, tensor: CheckpointTensor, size: int) -> None:
        layer = _layer_of(tensor.name)
        if layer is not None:
            self.layers[layer] += size
        elif tensor.role is Role.HEAD or tensor.name.endswith("norm_f.weight"):
            self.after += size
        else:
            self.before += size


class _Sums:
    """Bytes of one graph while they are added up."""

    def __init__(self, layers: int) -> None:
        self.all, self.held = _Places(layers), _Places(layers)
        self.stored = self.packed = self.largest_packed = 0
        self.by_kind: Counter[str] = Counter()
        self.by_dtype: Counter[str] = Counter()

    def add(self, tensor: CheckpointTensor, size: int, dtype: str, *, inside: bool) -> None:
        self.all.add(tensor, size)
        if dtype in FORMATS and inside:
            self.held.add(tensor, size)
            self.packed += size if _is_packed(dtype) else 0
        self.by_kind[tensor.role.value] += size
        self.by_dtype[dtype] += size

    def frozen(self, *, with_layers: bool) -> GraphWeights:
        layers, held = (
            tuple(places.layers) if with_layers else () for places in (self.all, self.held)
        )
        return GraphWeights(
            layers=layers,
            before=self.all.before,
            after=self.all.after,
            by_kind=MappingProxyType(dict(self.by_kind)),
            by_dtype=MappingProxyType(dict(self.by_dtype)),
            stored=self.stored,
            held=LayerBytes(held, self.held.before, self.held.after, self.largest_packed),
            packed=self.packed,
        )


def _graph_of(tensor: CheckpointTensor) -> str:
    if tensor.name == Tower.CONTEXT.head:
        return CONTEXT_HEAD
    return CONTEXT if tensor.tower is Tower.CONTEXT else DENOISER


def _layer_of(name: str) -> int | None:
    """A layer's modulation table belongs to it too."""
    parts = name.split(".")
    if parts[0] == "scale_shift_tables":
        return int(parts[1])
    return int(parts[2]) if parts[1] == "layers" else None


def _stack_of(tensor: CheckpointTensor) -> str:
    """The graph's weight a tensor goes into: experts are stacked, and q, k and v are one matrix."""
    stem, _, name = tensor.name.removesuffix(".weight").rpartition(".")
    if name in ("q_proj", "k_proj", "v_proj"):
        return f"{stem}.qkv_proj"
    if tensor.role is not Role.ROUTED_EXPERT:
        return tensor.name
    return f"{stem.rpartition('.')[0]}.{name}"


def _stored(
    tensor: CheckpointTensor,
    config: ModelConfig,
    dtype: str,
    few: str | None,
    *,
    rounded_input: bool = False,
) -> Iterator[tuple[int, str]]:
    """Bytes and type of a tensor, or of its parts: of Mamba's first product the rows that make dt are not quantized."""
    kept = "float32" if tensor.name.endswith(_FLOAT32) else dtype
    if few is None or (
        tensor.role is Role.MAMBA
        and not tensor.name.endswith(("in_proj.weight", "out_proj.weight"))
    ):
        yield math.prod(tensor.shape) * item_bytes(kept), kept
        return
    columns = tensor.shape[-1]
    if tensor.name.endswith("in_proj.weight"):
        yield config.mamba_num_heads * columns * item_bytes(kept), kept
    how = stored_format(
        few, columns, stacked=tensor.role is Role.ROUTED_EXPERT, rounded_input=rounded_input
    )
    yield how.nbytes((_count(tensor, config) // columns, columns), dtype), few
