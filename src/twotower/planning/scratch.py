"""Activation memory of an engine, estimated: the two largest tensors that must be alive at once, and what lives throughout."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.builders.profiles import profiles
from twotower.config.model import LayerKind, ModelConfig
from twotower.planning.weights import item_bytes
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER

__all__ = ["Scratch", "Shapes", "scratch"]


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the largest tensors depend on besides the model: element type, rows, capacity T of the cache and block size S."""

    dtype: str
    max_batch: int
    capacity: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Scratch:
    """Bytes, and which pair of tensors they are of."""

    nbytes: int
    because: str


def scratch(graph: str, config: ModelConfig, shapes: Shapes) -> Scratch:
    """The estimate for one graph over all its profiles: never measured on a GPU, and a library that fuses needs less."""
    if graph == CONTEXT_HEAD:
        return Scratch(2 * 4 * shapes.max_batch * config.vocab_size, "logits [B,V]")
    return max((_at(graph, config, shapes, length) for length in _lengths(graph, shapes)), key=lambda s: s.nbytes)


def _lengths(graph: str, shapes: Shapes) -> list[int]:
    """The longest chunk of each profile."""
    found = profiles(graph, max_batch=shapes.max_batch, block_size=shapes.block_size)
    return [p.axes["L"][2] if "L" in p.axes else shapes.block_size for p in found]


def _at(graph: str, config: ModelConfig, shapes: Shapes, length: int) -> Scratch:
    pairs = {"residual [B,L,D]": 2 * shapes.max_batch * length * config.hidden_size * item_bytes(shapes.dtype)}
    if LayerKind.MOE in config.layers:
        pairs["experts [E,B*L,D]"] = _experts(config, shapes, length)
    if LayerKind.MLP in config.layers:
        pairs["MLP [B,L,F]"] = 2 * shapes.max_batch * length * config.intermediate_size * item_bytes(shapes.dtype)
    if LayerKind.MAMBA in config.layers:
        pairs["decay [B,H,L,L]"] = 2 * 4 * shapes.max_batch * config.mamba_num_heads * length * length
        pairs["convolution [B,C,L]"] = 2 * 4 * shapes.max_batch * config.conv_channels * (length + config.conv_kernel - 1)
    if LayerKind.ATTENTION in config.layers:
        pairs["scores [B,H,L,T]"] = _scores(graph, config, shapes, length)
    if graph == DENOISER:
        pairs["logits [B,S,V]"] = 2 * 4 * shapes.max_batch * length * config.vocab_size
    name = max(pairs, key=pairs.__getitem__)
    return Scratch(pairs[name] + _throughout(graph, config, shapes, length), name)


def _experts(config: ModelConfig, shapes: Shapes, length: int) -> int:
    """Every expert computes every token: up and its square in the model's dtype, or down in float32 and weighed by the routing."""
    rows, item = config.n_routed_experts * shapes.max_batch * length, item_bytes(shapes.dtype)
    inner = 2 * rows * config.moe_intermediate_size * item
    across = rows * (config.moe_intermediate_size + config.hidden_size) * item
    return max(inner, across, 2 * rows * config.hidden_size * 4)


def _scores(graph: str, config: ModelConfig, shapes: Shapes, length: int) -> int:
    """The denoiser's scores are written out; the context's only in float32, where there is no fused kernel."""
    if graph == CONTEXT and shapes.dtype != "float32":
        return 2 * shapes.max_batch * length * config.num_attention_heads * config.head_dim * item_bytes(shapes.dtype)
    seen = shapes.capacity + (length if graph == DENOISER else 0)
    return 2 * 4 * shapes.max_batch * config.num_attention_heads * length * seen


def _throughout(graph: str, config: ModelConfig, shapes: Shapes, length: int) -> int:
    """The residual stream and the attention mask (one byte a place), alive from the first layer to the last."""
    stream = shapes.max_batch * length * config.hidden_size * item_bytes(shapes.dtype)
    rows = length if graph == CONTEXT else 1
    mask = shapes.max_batch * rows * shapes.capacity if LayerKind.ATTENTION in config.layers else 0
    return stream + mask
