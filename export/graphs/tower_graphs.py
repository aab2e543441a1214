"""The context tower, its head and the denoiser as whole graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from twotower.checkpoint.layout import Tower
from twotower.config import LayerKind, ModelConfig
from twotower.export.graphs.attention import MASKED, context_attention, denoiser_attention
from twotower.export.graphs.layers import (
    LayerWeights,
    conditioning,
    mlp,
    modulation,
    moe,
    normed_input,
    rms_norm,
)
from twotower.export.graphs.mamba import ChunkInfo, mamba
from twotower.export.graphs.precision import Precision, Tap
from twotower.export.graphs.recorder import GraphBuilder
from twotower.export.graphs.sampler import mask_info, relative_to_best, sample_and_commit
from twotower.spec import (
    BLOCK,
    CANDIDATE_IDS,
    CANDIDATE_LOGPROBS,
    CHUNK_LENGTH,
    CONTEXT,
    CONTEXT_HEAD,
    CONTEXT_LENGTH,
    DENOISER,
    HIDDEN,
    PAST_LENGTH,
    TOKENS,
    candidate_count,
    past_conv,
    past_key,
    past_ssm,
    past_value,
    present_conv,
    present_key,
    present_ssm,
    present_value,
    signatures,
)
from twotower.weights.declared import Weight

__all__ = ["TowerGraph", "build_graph"]


@dataclass(frozen=True, slots=True)
class TowerGraph:
    """A recorded graph, the weights it declares, in declaration order (which is layer order), and the inputs of its products."""

    model: ir.Model
    weights: tuple[Weight, ...]
    taps: tuple[Tap, ...] = ()


def build_graph(
    name: str, config: ModelConfig, dtype: str, precision: Precision | None = None
) -> TowerGraph:
    """Records one graph of the contract; needs no weights and no torch, and takes well under a second at 52 layers.

    Args:
        config: The model.
        name: `context`, `context_head` or `denoiser`.
        dtype: `float32`, `float16` or `bfloat16`; the SSM state and its scan, norms, softmax and
            routing stay float32.
        precision: What is stored or computed in few bits; None for nothing.
    """
    graph = GraphBuilder(signatures(config, dtype)[name], dtype, precision)
    {CONTEXT: _context, CONTEXT_HEAD: _context_head, DENOISER: _denoiser}[name](graph, config)
    return TowerGraph(graph.finish(), tuple(graph.weights), tuple(graph.taps.values()))


def _context(graph: GraphBuilder, config: ModelConfig) -> None:
    with graph.scope("embed"):
        h = _embed(graph, Tower.CONTEXT, graph.input(TOKENS), config)
    with graph.scope("chunk"):
        chunk = _chunk(graph, graph.input(TOKENS), lengths=graph.input(CHUNK_LENGTH))
        mask = _causal_mask(graph, config)
    for i, kind in enumerate(config.layers):
        with graph.scope(f"layers.{i}.{kind.name.lower()}"):
            h = graph.op("Add", h, _context_mixer(graph, h, config, i, chunk=chunk, mask=mask))
    with graph.scope("norm_f"):
        last = _last_valid(graph, h)
        norm = LayerWeights(graph, f"{Tower.CONTEXT.value}.")(
            "norm_f.weight", config.hidden_size, dtype="float32"
        )
        graph.output(HIDDEN, rms_norm(graph, last, norm, config.layer_norm_epsilon))


def _context_mixer(
    graph: GraphBuilder,
    h: ir.Value,
    config: ModelConfig,
    i: int,
    *,
    chunk: ChunkInfo,
    mask: ir.Value | None,
) -> ir.Value:
    kind = config.layers[i]
    layer = LayerWeights(graph, f"{Tower.CONTEXT.value}.layers.{i}.")
    weights = LayerWeights(graph, f"{Tower.CONTEXT.value}.layers.{i}.mixer.")
    u = rms_norm(
        graph,
        h,
        layer("norm.weight", config.hidden_size, dtype="float32"),
        config.layer_norm_epsilon,
    )
    if kind is LayerKind.MAMBA:
        out = mamba(
            graph,
            u,
            weights,
            config,
            past=(graph.input(past_conv(i)), graph.input(past_ssm(i))),
            chunk=chunk,
        )
        assert out.conv is not None and out.ssm is not None
        graph.output(present_conv(i), out.conv)
        graph.output(present_ssm(i), out.ssm)
        return out.y
    if kind is LayerKind.ATTENTION:
        assert mask is not None
        past = (graph.input(past_key(i)), graph.input(past_value(i)))
        y, keys, values = context_attention(graph, u, weights, config, past=past, mask=mask)
        graph.output(present_key(i), keys)
        graph.output(present_value(i), values)
        return y
    return _feed_forward(graph, u, weights, config, kind)


def _denoiser(graph: GraphBuilder, config: ModelConfig) -> None:
    with graph.scope("embed"):
        h = _embed(graph, Tower.DENOISER, graph.input(BLOCK), config)
    with graph.scope("conditioning"):
        masks, fraction = mask_info(graph, config)
        shared = conditioning(graph, fraction, config)
    with graph.scope("block"):
        chunk = _chunk(graph, graph.input(BLOCK), lengths=None)
        limit = _score_limit(graph, config)
    tower = LayerWeights(graph, f"{Tower.DENOISER.value}.")
    for i, kind in enumerate(config.layers):
        with graph.scope(f"layers.{i}.{kind.name.lower()}"):
            by = modulation(graph, shared, config, i)
            norm = tower(f"layers.{i}.norm.weight", config.hidden_size, dtype="float32")
            u = normed_input(graph, h, norm, kind, by=by, epsilon=config.layer_norm_epsilon)
            y = _denoiser_mixer(graph, u, config, i, chunk=chunk, limit=limit)
            h = graph.op("Add", h, graph.op("Mul", by.gate, y))
    with graph.scope("lm_head"):
        normed = rms_norm(
            graph,
            h,
            tower("norm_f.weight", config.hidden_size, dtype="float32"),
            config.layer_norm_epsilon,
        )
        logits = graph.to_float32(graph.linear(normed, _head_weight(graph, Tower.DENOISER, config)))
    with graph.scope("sampler"):
        sample_and_commit(graph, logits, masks, config)


def _denoiser_mixer(
    graph: GraphBuilder,
    u: ir.Value,
    config: ModelConfig,
    i: int,
    *,
    chunk: ChunkInfo,
    limit: ir.Value | None,
) -> ir.Value:
    kind = config.layers[i]
    weights = LayerWeights(graph, f"{Tower.DENOISER.value}.layers.{i}.mixer.")
    if kind is LayerKind.MAMBA:
        return mamba(
            graph,
            u,
            weights,
            config,
            past=(graph.input(past_conv(i)), graph.input(past_ssm(i))),
            chunk=chunk,
        ).y
    if kind is LayerKind.ATTENTION:
        assert limit is not None
        past = (graph.input(past_key(i)), graph.input(past_value(i)))
        return denoiser_attention(graph, u, weights, config, past=past, limit=limit)
    return _feed_forward(graph, u, weights, config, kind)


def _context_head(graph: GraphBuilder, config: ModelConfig) -> None:
    logits = graph.to_float32(
        graph.linear(graph.input(HIDDEN), _head_weight(graph, Tower.CONTEXT, config))
    )
    best, ids = graph.ops("TopK", 2, logits, graph.constant([candidate_count(config)]), axis=-1)
    relative, total = relative_to_best(graph, logits, best)
    graph.output(CANDIDATE_IDS, ids)
    graph.output(CANDIDATE_LOGPROBS, graph.op("Sub", relative, graph.op("Log", total)))


def _feed_forward(
    graph: GraphBuilder, u: ir.Value, weights: LayerWeights, config: ModelConfig, kind: LayerKind
) -> ir.Value:
    if kind is LayerKind.MOE:
        return moe(graph, u, weights, config)
    d, f = config.hidden_size, config.intermediate_size
    return mlp(graph, u, (weights("up_proj.weight", f, d), weights("down_proj.weight", d, f)))


def _embed(graph: GraphBuilder, tower: Tower, tokens: ir.Value, config: ModelConfig) -> ir.Value:
    table = LayerWeights(graph, f"{tower.value}.")(
        "embeddings.weight", config.vocab_size, config.hidden_size
    )
    return graph.op("Gather", table, tokens, axis=0)


def _head_weight(graph: GraphBuilder, tower: Tower, config: ModelConfig) -> ir.Value:
    return LayerWeights(graph, "")(tower.head, config.vocab_size, config.hidden_size)


def _range_of(graph: GraphBuilder, x: ir.Value, *, axis: int) -> ir.Value:
    """0, 1, ... along one axis of x, int64."""
    length = graph.op("Shape", x, start=axis, end=axis + 1)
    return graph.op("Range", graph.constant(0), graph.op("Squeeze", length), graph.constant(1))


def _chunk(graph: GraphBuilder, tokens: ir.Value, *, lengths: ir.Value | None) -> ChunkInfo:
    """What there is to know of a chunk [B,L]; with `lengths` [B] what comes after is padding."""
    length = graph.op("Shape", tokens, start=1, end=2)
    positions = _range_of(graph, tokens, axis=1)
    first, second = (graph.op("Unsqueeze", positions, graph.constant([axis])) for axis in (1, 0))
    seen = graph.op("GreaterOrEqual", first, second)
    never = graph.constant(-math.inf, "float32")
    future = graph.op("Where", seen, graph.constant(0.0, "float32"), never)
    until = graph.op("Cast", seen, to=ir.DataType.FLOAT)
    if lengths is None:
        return ChunkInfo(length, future, until, valid=None, lengths=None)
    valid = graph.op("Less", second, graph.op("Unsqueeze", lengths, graph.constant([1])))
    valid = graph.op("Cast", valid, to=ir.DataType.FLOAT)
    valid = graph.op("Unsqueeze", valid, graph.constant([1]))  # [B,1,L]
    return ChunkInfo(length, future, until, valid=valid, lengths=lengths)


def _causal_mask(graph: GraphBuilder, config: ModelConfig) -> ir.Value | None:
    """[B,1,L,T] bool: position past + l sees the cache up to itself. Padding lies beyond every valid position, so it is never seen."""
    layers = config.indices(LayerKind.ATTENTION)
    if not layers:
        return None
    slots = _range_of(graph, graph.input(past_key(layers[0])), axis=2)
    positions = _range_of(graph, graph.input(TOKENS), axis=1)
    own = graph.op(
        "Add", graph.op("Unsqueeze", graph.input(PAST_LENGTH), graph.constant([1])), positions
    )  # [B,L]
    return graph.op("LessOrEqual", slots, graph.op("Unsqueeze", own, graph.constant([1, 3])))


def _score_limit(graph: GraphBuilder, config: ModelConfig) -> ir.Value | None:
    """[B*KV,1,T] float32: what no score of a cache slot exceeds, nothing where it holds a token."""
    layers = config.indices(LayerKind.ATTENTION)
    if not layers:
        return None
    slots = _range_of(graph, graph.input(past_key(layers[0])), axis=2)
    lengths = graph.op("Unsqueeze", graph.input(CONTEXT_LENGTH), graph.constant([1]))
    lengths = graph.op("Expand", lengths, graph.constant([1, config.num_key_value_heads]))
    held = graph.op("Less", slots, graph.reshape(lengths, -1, 1, 1))
    never, always = graph.constant(MASKED, "float32"), graph.constant(-MASKED, "float32")
    return graph.op("Where", held, always, never)


def _last_valid(graph: GraphBuilder, h: ir.Value) -> ir.Value:
    """H [B,L,D] at each row's last valid token, [B,D]; a row without tokens gives its first (unused) position."""
    last = graph.op(
        "Max", graph.op("Sub", graph.input(CHUNK_LENGTH), graph.constant(1)), graph.constant(0)
    )
    return graph.op("GatherND", h, graph.op("Unsqueeze", last, graph.constant([1])), batch_dims=1)
