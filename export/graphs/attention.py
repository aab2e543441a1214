"""Grouped-query attention without positions: causal over the cache for the context, two segments for the denoiser."""

from __future__ import annotations

import math

import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graphs.builder import GraphBuilder
from twotower.export.graphs.layers import LayerWeights
from twotower.spec import BLOCK, PAST_LENGTH

__all__ = ["MASKED", "context_attention", "denoiser_attention"]

MASKED = -1e30
"""The float32 score of a position that must not be attended: finite, so that no backend has to do arithmetic with -inf."""


def context_attention(
    graph: GraphBuilder, u: ir.Value, weights: LayerWeights, config: ModelConfig, *, past: tuple[ir.Value, ir.Value], mask: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention of a chunk u [B,L,D] over everything before and the chunk itself.

    The chunk's keys and values are written into the cache [B,KV,T,hd] at `past_length`, in place where the caller binds
    both names to one buffer; `mask` [B,1,L,T] is explicit because readers of `Attention` disagree about its causal
    alignment and drop its length input.

    Returns:
        The output [B,L,D] and the updated key and value caches.
    """
    q, k, v = (_heads(graph, u, weights, config, name) for name in ("q", "k", "v"))
    where = graph.input(PAST_LENGTH)
    keys = graph.op("TensorScatter", past[0], k, where, axis=-2)
    values = graph.op("TensorScatter", past[1], v, where, axis=-2)
    out = graph.op("Attention", q, keys, values, mask, scale=1.0 / math.sqrt(config.head_dim))
    out = graph.reshape(graph.op("Transpose", out, perm=[0, 2, 1, 3]), 0, 0, -1)
    return _project(graph, out, weights, config), keys, values


def denoiser_attention(
    graph: GraphBuilder, u: ir.Value, weights: LayerWeights, config: ModelConfig, *, past: tuple[ir.Value, ir.Value], mask: ir.Value
) -> ir.Value:
    """Attention of a block u [B,S,D] over the context's cache [B,KV,T,hd] and the whole block.

    The two segments meet in the softmax only. Concatenating the caches instead would copy every key and value of the
    context in every step of every layer.

    `mask` [B,1,1,T] is True where the cache holds a token.
    """
    kv, queries, size = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, config.head_dim
    q = _linear(graph, u, weights, config, "q")
    q = graph.op("Transpose", graph.reshape(q, 0, 0, kv, queries, size), perm=[0, 2, 3, 1, 4])
    q = graph.reshape(q, 0, kv, -1, size)  # [B,KV,G*S,hd]: the query heads of a group are more rows of one product
    q = graph.op("Mul", q, graph.scalar(1.0 / math.sqrt(size)))
    k, v = (_heads(graph, u, weights, config, name) for name in ("k", "v"))

    def scores(keys: ir.Value) -> ir.Value:
        return graph.to_float32(graph.op("MatMul", q, graph.op("Transpose", keys, perm=[0, 1, 3, 2])))

    before = graph.op("Where", mask, scores(past[0]), graph.constant(MASKED, "float32"))
    weight = graph.op("Softmax", graph.op("Concat", before, scores(k), axis=-1), axis=-1)
    weight = graph.to_model_dtype(weight)
    capacity = graph.shared("capacity", lambda: graph.op("Shape", past[0], start=2, end=3))
    start, end, axis = graph.constant([0]), graph.constant([2**62]), graph.constant([3])
    out = graph.op(
        "Add",
        graph.op("MatMul", graph.op("Slice", weight, start, capacity, axis), past[1]),
        graph.op("MatMul", graph.op("Slice", weight, capacity, end, axis), v),
    )
    # [B,KV,G*S,hd] back to [B,S,H*hd]; S is not a constant, so the block's own length stands in the shape.
    length = graph.shared("block length", lambda: graph.op("Shape", graph.input(BLOCK), start=1, end=2))
    fixed = graph.constant([0, kv, queries]), length, graph.constant([size])
    shape = graph.shared("head shape", lambda: graph.op("Concat", *fixed, axis=0))
    out = graph.op("Transpose", graph.op("Reshape", out, shape), perm=[0, 3, 1, 2, 4])
    return _project(graph, graph.reshape(out, 0, 0, -1), weights, config)


def _linear(graph: GraphBuilder, u: ir.Value, weights: LayerWeights, config: ModelConfig, name: str) -> ir.Value:
    heads = config.num_attention_heads if name == "q" else config.num_key_value_heads
    return graph.linear(u, weights(f"{name}_proj.weight", heads * config.head_dim, config.hidden_size))


def _heads(graph: GraphBuilder, u: ir.Value, weights: LayerWeights, config: ModelConfig, name: str) -> ir.Value:
    """A projection of u [B,L,D] as [B,heads,L,hd]."""
    heads = config.num_attention_heads if name == "q" else config.num_key_value_heads
    split = graph.reshape(_linear(graph, u, weights, config, name), 0, 0, heads, config.head_dim)
    return graph.op("Transpose", split, perm=[0, 2, 1, 3])


def _project(graph: GraphBuilder, x: ir.Value, weights: LayerWeights, config: ModelConfig) -> ir.Value:
    return graph.linear(x, weights("o_proj.weight", config.hidden_size, config.num_attention_heads * config.head_dim))
