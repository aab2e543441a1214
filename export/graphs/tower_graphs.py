"""The context tower, its head and the denoiser as whole graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from twotower.checkpoint.layout import Tower
from twotower.config import LayerKind, ModelConfig
from twotower.export.graphs.layers import (
    MASKED,
    conditioning,
    context_attention,
    denoiser_attention,
    mlp,
    modulation,
    moe,
    normed_input,
    rms_norm,
)
from twotower.export.graphs.mamba import mamba
from twotower.export.graphs.precision import Precision, Tap
from twotower.export.graphs.recorder import ChunkInfo, GraphBuilder, Layer
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
    past_key,
    signatures,
)
from twotower.weights.declared import Weight, declared_weights


@dataclass(frozen=True, slots=True)
class TowerGraph:
    """A recorded graph, its weights in declaration order, and the inputs of its products."""

    model: ir.Model
    weights: tuple[Weight, ...]
    taps: tuple[Tap, ...] = ()


def build_graph(
    name: str,
    config: ModelConfig,
    dtype: str,
    precision: Precision | None = None,
) -> TowerGraph:
    """Records one graph of the contract, without weights or torch and well within a second.

    Args:
        name: `context`, `context_head` or `denoiser`.
        config: The model.
        dtype: `float32`, `float16` or `bfloat16`; the SSM state and its scan, norms, softmax and
            routing stay float32.
        precision: What is quantized; None for nothing.
    """
    few = precision or Precision()
    declared = declared_weights(config, name, dtype, few.weights)
    graph = GraphBuilder(
        signatures(config, dtype)[name],
        dtype,
        declared,
        few.activations,
    )
    record = {
        CONTEXT: record_context,
        CONTEXT_HEAD: record_context_head,
        DENOISER: record_denoiser,
    }[name]
    record(graph, config)
    assert tuple(graph.weights) == declared, f"the {name} graph declares other weights"
    return TowerGraph(
        graph.finish(),
        declared,
        tuple(graph.taps.values()),
    )


def record_context(graph: GraphBuilder, config: ModelConfig) -> None:
    tower = Layer(graph, config, f"{Tower.CONTEXT.value}.")
    tokens = graph.input(TOKENS)
    with graph.scope("embed"):
        h = graph.op(
            "Gather",
            tower.weight("embeddings.weight"),
            tokens,
            axis=0,
        )
    with graph.scope("chunk"):
        chunk = _chunk(tower, tokens, lengths=graph.input(CHUNK_LENGTH))
    for i, kind in enumerate(config.layers):
        with graph.scope(f"layers.{i}.{kind.name.lower()}"):
            layer = replace(
                tower,
                prefix=f"{tower.prefix}layers.{i}.",
                number=i,
            )
            h = graph.op(
                "Add",
                h,
                _mixer(layer, rms_norm(layer, h), chunk),
            )
    with graph.scope("norm_f"):
        # The hidden vector of each row's last valid token, [B,D]; a row without tokens gives its
        # first position, which nobody uses.
        last = graph.op(
            "Sub",
            graph.input(CHUNK_LENGTH),
            graph.constant(1),
        )
        last = graph.op("Max", last, graph.constant(0))
        last = graph.unsqueeze(last, 1)
        last = graph.op("GatherND", h, last, batch_dims=1)
        graph.output(HIDDEN, rms_norm(tower, last, "norm_f.weight"))


def record_denoiser(graph: GraphBuilder, config: ModelConfig) -> None:
    model = Layer(graph, config)
    tower = replace(model, prefix=f"{Tower.DENOISER.value}.")
    block = graph.input(BLOCK)
    with graph.scope("embed"):
        h = graph.op(
            "Gather",
            tower.weight("embeddings.weight"),
            block,
            axis=0,
        )
    with graph.scope("conditioning"):
        masks, fraction = mask_info(graph, config)
        shared = conditioning(model, fraction)
    with graph.scope("block"):
        chunk = _chunk(tower, block, lengths=None)
    for i, kind in enumerate(config.layers):
        with graph.scope(f"layers.{i}.{kind.name.lower()}"):
            layer = replace(
                tower,
                prefix=f"{tower.prefix}layers.{i}.",
                number=i,
            )
            by = modulation(model, shared, i)
            y = _mixer(layer, normed_input(layer, h, by), chunk)
            h = graph.op("Add", h, graph.op("Mul", by.gate, y))
    with graph.scope("lm_head"):
        normed = rms_norm(tower, h, "norm_f.weight")
        logits = graph.linear(normed, graph.weight(Tower.DENOISER.head))
        logits = graph.to_float32(logits)
    with graph.scope("sampler"):
        sample_and_commit(graph, logits, masks, config)


def record_context_head(graph: GraphBuilder, config: ModelConfig) -> None:
    logits = graph.linear(graph.input(HIDDEN), graph.weight(Tower.CONTEXT.head))
    logits = graph.to_float32(logits)
    best, ids = graph.ops(
        "TopK",
        2,
        logits,
        graph.constant([candidate_count(config)]),
        axis=-1,
    )
    relative, total = relative_to_best(graph, logits, best)
    graph.output(CANDIDATE_IDS, ids)
    graph.output(
        CANDIDATE_LOGPROBS,
        graph.op(
            "Sub",
            relative,
            graph.op("Log", total),
        ),
    )


def _mixer(
    layer: Layer,
    u: ir.Value,
    chunk: ChunkInfo,
) -> ir.Value:
    kind = layer.config.layers[layer.number]
    mixer = replace(layer, prefix=f"{layer.prefix}mixer.")
    if kind is LayerKind.MAMBA:
        return mamba(mixer, u, chunk)
    if kind is LayerKind.ATTENTION:
        attention = denoiser_attention if chunk.lengths is None else context_attention
        return attention(mixer, u, chunk)
    if kind is LayerKind.MOE:
        return moe(mixer, u)
    return mlp(mixer, u)


def _chunk(
    tower: Layer,
    tokens: ir.Value,
    *,
    lengths: ir.Value | None,
) -> ChunkInfo:
    """What there is to know of a chunk [B,L]; with `lengths` [B] what comes after is padding."""
    graph = tower.graph
    length = graph.size(tokens, 1)
    positions = graph.places(tokens, 1)
    first = graph.unsqueeze(positions, 1)
    second = graph.unsqueeze(positions, 0)
    seen = graph.op("GreaterOrEqual", first, second)
    never = graph.constant(-math.inf, "float32")
    future = graph.op(
        "Where",
        seen,
        graph.constant(0.0, "float32"),
        never,
    )
    until = graph.op("Cast", seen, to=ir.DataType.FLOAT)
    if lengths is None:
        return ChunkInfo(length, future, until, _seen(tower, causal=False))
    valid = graph.op("Less", second, graph.unsqueeze(lengths, 1))
    valid = graph.op("Cast", valid, to=ir.DataType.FLOAT)
    valid = graph.unsqueeze(valid, 1)  # [B,1,L]
    return ChunkInfo(length, future, until, _seen(tower, causal=True), valid, lengths)


def _seen(tower: Layer, *, causal: bool) -> ir.Value | None:
    """What attention may see of the cache, as `ChunkInfo.seen` says; `causal` for the context."""
    graph, config = tower.graph, tower.config
    layers = config.indices(LayerKind.ATTENTION)
    if not layers:
        return None
    slots = graph.places(graph.input(past_key(layers[0])), 2)
    if causal:
        # Position past + l sees the cache up to itself, so never padding.
        positions = graph.places(graph.input(TOKENS), 1)
        past = graph.unsqueeze(graph.input(PAST_LENGTH), 1)
        own = graph.op("Add", past, positions)  # [B,L]
        return graph.op(
            "LessOrEqual",
            slots,
            graph.unsqueeze(own, 1, 3),
        )
    lengths = graph.unsqueeze(graph.input(CONTEXT_LENGTH), 1)
    lengths = graph.op(
        "Expand",
        lengths,
        graph.constant([1, config.num_key_value_heads]),
    )
    held = graph.op("Less", slots, graph.reshape(lengths, -1, 1, 1))
    never, always = graph.constant(MASKED, "float32"), graph.constant(-MASKED, "float32")
    return graph.op("Where", held, always, never)
