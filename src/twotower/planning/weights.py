"""Weight bytes of the three graphs by layer and by kind, from the config alone; few-bit experts by arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from twotower.config.model import ModelConfig
from twotower.config.tensors import CheckpointTensor, Role, Tower, expected_tensors
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER

__all__ = ["EXPERT_RECIPES", "LARGE", "LINE", "PAGE", "ExpertRecipe", "GraphWeights", "checkpoint_bytes", "graph_weights", "item_bytes"]

PAGE, LINE, LARGE = 4096, 64, 1 << 20
"""A weight of a megabyte or more starts on a page in a bundle's data file, a smaller one on a cache line (`twotower.graph_files`)."""

_FLOAT32 = ("norm.weight", "norm_f.weight", ".D", ".dt_bias", ".A_log", ".gate.weight", ".e_score_correction_bias")
"""Ends of the names that a graph keeps in float32 whatever the model's dtype."""


@dataclass(frozen=True, slots=True)
class ExpertRecipe:
    """Routed experts in few bits: `bits` a weight, and `scale_bytes` for each `group` of weights of a row (0: for a whole row)."""

    name: str
    bits: int
    group: int
    scale_bytes: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one expert's matrix with its scales."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        groups = -(-columns // self.group) if self.group else 1
        return -(-rows * columns * self.bits // 8) + rows * groups * self.scale_bytes


EXPERT_RECIPES = {
    "int8": ExpertRecipe("int8", 8, 0, 2),
    "int4": ExpertRecipe("int4", 4, 128, 2),
    "nvfp4": ExpertRecipe("nvfp4", 4, 16, 1),
}
"""int8 with a float16 scale a row, int4 with a float16 scale for 128, NVFP4 with a float8 scale for 16."""


@dataclass(frozen=True, slots=True)
class GraphWeights:
    """Weight bytes of one graph.

    Attributes:
        layers: Of each layer.
        before: Of the embedding and, in the denoiser, the conditioning's own products.
        after: Of the final norm and the head.
        by_kind: The same bytes by what the weights are for.
        by_dtype: The same bytes by element type; few-bit experts go by the recipe's name, scales included.
        stored: Bytes of the data file: every weight starts on a page.
    """

    layers: tuple[int, ...]
    before: int
    after: int
    by_kind: Mapping[str, int]
    by_dtype: Mapping[str, int]
    stored: int

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


def item_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of the checkpoint's tensors if all are in the config's dtype."""
    return sum(math.prod(t.shape) for t in expected_tensors(config).values()) * item_bytes(config.dtype)


@lru_cache(maxsize=64)
def graph_weights(config: ModelConfig, dtype: str, experts: str | None = None) -> Mapping[str, GraphWeights]:
    """Weight bytes of every graph.

    Args:
        config: The model.
        dtype: Element type of the graphs.
        experts: A recipe of `EXPERT_RECIPES` for the routed experts, None for `dtype`.
    """
    recipe = EXPERT_RECIPES[experts] if experts else None
    sums = {name: _Sums(len(config.layers)) for name in (CONTEXT, CONTEXT_HEAD, DENOISER)}
    stacks: Counter[tuple[str, str]] = Counter()
    for tensor in expected_tensors(config).values():
        kept = _dtype_of(tensor, dtype, recipe)
        size = recipe.nbytes(tensor.shape) if recipe and kept == recipe.name else math.prod(tensor.shape) * item_bytes(kept)
        graph = _graph_of(tensor)
        sums[graph].add(tensor, size, kept)
        stacks[graph, _stack_of(tensor)] += size
    for (graph, _), size in stacks.items():
        step = PAGE if size >= LARGE else LINE
        sums[graph].stored += -(-size // step) * step
    return MappingProxyType({name: s.frozen(with_layers=name != CONTEXT_HEAD) for name, s in sums.items()})


class _Sums:
    """Bytes of one graph while they are added up."""

    def __init__(self, layers: int) -> None:
        self.layers = [0] * layers
        self.before = self.after = self.stored = 0
        self.by_kind: Counter[str] = Counter()
        self.by_dtype: Counter[str] = Counter()

    def add(self, tensor: CheckpointTensor, size: int, dtype: str) -> None:
        layer = _layer_of(tensor.name)
        if layer is not None:
            self.layers[layer] += size
        elif tensor.role is Role.HEAD or tensor.name.endswith("norm_f.weight"):
            self.after += size
        else:
            self.before += size
        self.by_kind[tensor.role.value] += size
        self.by_dtype[dtype] += size

    def frozen(self, *, with_layers: bool) -> GraphWeights:
        layers = tuple(self.layers) if with_layers else ()
        return GraphWeights(
            layers, self.before, self.after, MappingProxyType(dict(self.by_kind)), MappingProxyType(dict(self.by_dtype)), self.stored
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
    """The graph's weight a tensor goes into: routed experts are stacked, one weight a projection."""
    if tensor.role is not Role.ROUTED_EXPERT:
        return tensor.name
    parts = tensor.name.split(".")
    return ".".join((*parts[:-3], parts[-2]))


def _dtype_of(tensor: CheckpointTensor, dtype: str, recipe: ExpertRecipe | None) -> str:
    if recipe and tensor.role is Role.ROUTED_EXPERT:
        return recipe.name
    return "float32" if tensor.name.endswith(_FLOAT32) else dtype
