"""Grouped-query attention without positions: causal over the cache for the context, two segments for the denoiser."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graphs.layers import LayerWeights
from twotower.export.graphs.recorder import GraphBuilder
from twotower.spec import BLOCK, PAST_LENGTH, TOKENS, splits_groups

__all__ = ["MASKED", "context_attention", "denoiser_attention"]

MASKED = -1e30
"""The float32 score of a position that must not be attended: finite, so that no backend has to do arithmetic with -inf."""


def context_attention(
    graph: GraphBuilder,
    u: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
    *,
    past: tuple[ir.Value, ir.Value],
    mask: ir.Value,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention of a chunk u [B,L,D] over everything before and the chunk itself.

    The chunk's keys and values are written into the cache [B,KV,T,hd] at `past_length`, in place
    where the caller binds both names to one buffer; `mask` [B,1,L,T] is explicit because readers of
    `Attention` disagree about its causal alignment and drop its length input.

    Where groups of query heads are large enough, every head of keys is a row of its own: the kernel
    of TensorRT for RTX takes one head of keys for all queries, but of several one for each, and
    would write all keys and values as often as there are query heads.

    Returns:
        The output [B,L,D] and the updated key and value caches.
    """
    q, k, v = _projected(graph, u, weights, config)
    where = graph.input(PAST_LENGTH)
    keys = graph.op("TensorScatter", past[0], k, where, axis=-2)
    values = graph.op("TensorScatter", past[1], v, where, axis=-2)
    if splits_groups(config):
        out = _group_by_group(graph, (q, keys, values), config, (mask, past[0]))
    else:
        scale = 1.0 / math.sqrt(config.head_dim)
        out = graph.op("Attention", q, keys, values, mask, scale=scale)
    return _merged(graph, out, weights, config), keys, values


def _group_by_group(
    graph: GraphBuilder,
    inputs: tuple[ir.Value, ir.Value, ir.Value],
    config: ModelConfig,
    given: tuple[ir.Value, ir.Value],
) -> ir.Value:
    """Attention of q [B,H,L,hd] over keys and values [B,KV,T,hd], each head of keys as a row.

    `given` is the mask and a cache as it comes in: its shape serves all layers, and a graph that is
    cut between them must not compute the layer that it would otherwise be taken from.
    """
    q, keys, values = inputs
    mask, cache = given
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = graph.shared("chunk", lambda: graph.op("Shape", graph.input(TOKENS), start=1, end=2))
    capacity = _capacity(graph, cache)
    q = graph.reshape(q, -1, heads // groups, length, size)
    keys, values = (graph.reshape(x, -1, 1, capacity, size) for x in (keys, values))

    def of_heads() -> ir.Value:
        every = graph.op("Expand", mask, graph.constant([1, groups, 1, 1]))
        return graph.reshape(every, -1, 1, length, capacity)

    mask = graph.shared("mask of heads", of_heads)
    out = graph.op("Attention", q, keys, values, mask, scale=1.0 / math.sqrt(size))
    return graph.reshape(out, -1, heads, length, size)


def denoiser_attention(
    graph: GraphBuilder,
    u: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
    *,
    past: tuple[ir.Value, ir.Value],
    limit: ir.Value,
) -> ir.Value:
    """Attention of a block u [B,S,D] over the context's cache [B,KV,T,hd] and the whole block.

    The two segments meet in the softmax only. Concatenating the caches instead would copy every key
    and value of the context in every step of every layer.

    Rows and heads of keys are one axis, [B*KV,...]: TensorRT reads a transposed operand where it
    lies in a product with one such axis, and copies it, all keys, in one with two. The query heads
    of a group are more rows of one product.

    `limit` [B*KV,1,T] float32 is `MASKED` where the cache holds no token and -`MASKED` elsewhere.
    """
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = _projected(graph, u, weights, config)
    length = graph.shared("block", lambda: graph.op("Shape", graph.input(BLOCK), start=1, end=2))
    each = graph.constant([heads // groups])
    rows = graph.shared("query rows", lambda: graph.op("Mul", length, each))
    q = graph.reshape(graph.op("Mul", q, graph.scalar(1.0 / math.sqrt(size))), -1, rows, size)
    k, v = (graph.reshape(x, -1, length, size) for x in (k, v))
    capacity = _capacity(graph, past[0])
    keys, values = (graph.reshape(x, -1, capacity, size) for x in past)

    def scores(keys: ir.Value) -> ir.Value:
        products = graph.op("MatMul", q, graph.op("Transpose", keys, perm=[0, 2, 1]))
        return graph.to_float32(products)

    # The lesser of the two and no selection: an infinite score of a place without a token goes too,
    # and ONNX Runtime does it many times as fast.
    before = graph.op("Min", scores(keys), limit)
    weight = graph.op("Softmax", graph.op("Concat", before, scores(k), axis=-1), axis=-1)
    weight = graph.to_model_dtype(weight)
    start, end, axis = graph.constant([0]), graph.constant([2**62]), graph.constant([2])
    seen = graph.op("MatMul", graph.op("Slice", weight, start, capacity, axis), values)
    own = graph.op("MatMul", graph.op("Slice", weight, capacity, end, axis), v)
    out = graph.reshape(graph.op("Add", seen, own), -1, heads, length, size)
    return _merged(graph, out, weights, config)


def _projected(
    graph: GraphBuilder,
    u: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
) -> Sequence[ir.Value]:
    """Queries [B,H,L,hd], keys and values [B,KV,L,hd] of u [B,L,D], in one product."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    names = [f"{name}_proj.weight" for name in "qkv"]
    every = heads + 2 * groups
    weight = weights.joined("qkv_proj.weight", names, every * size, config.hidden_size)
    split = graph.reshape(graph.linear(u, weight), 0, 0, every, size)
    split = graph.op("Transpose", split, perm=[0, 2, 1, 3])
    return graph.ops("Split", 3, split, graph.constant([heads, groups, groups]), axis=1)


def _capacity(graph: GraphBuilder, cache: ir.Value) -> ir.Value:
    """T, [1] int64."""
    return graph.shared("capacity", lambda: graph.op("Shape", cache, start=2, end=3))


def _merged(
    graph: GraphBuilder,
    x: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
) -> ir.Value:
    """The output [B,L,D] of heads [B,H,L,hd]."""
    x = graph.reshape(graph.op("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, -1)
    inner = config.num_attention_heads * config.head_dim
    return graph.linear(x, weights("o_proj.weight", config.hidden_size, inner))
