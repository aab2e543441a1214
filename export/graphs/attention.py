"""Grouped-query attention without positions, of the context tower and of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from twotower.export.graphs.recorder import ChunkInfo, Layer
from twotower.spec import (
    BLOCK,
    PAST_LENGTH,
    TOKENS,
    past_key,
    past_value,
    present_key,
    present_value,
    splits_groups,
)

MASKED = -1e30
"""The float32 score of a position that must not be attended: finite, so that no backend has to do
arithmetic with -inf."""


def context_attention(layer: Layer, u: ir.Value, chunk: ChunkInfo) -> ir.Value:
    """Attention [B,L,D] of a chunk u [B,L,D] over everything before it and itself.

    The chunk's keys and values are written into the cache [B,KV,T,hd] at `past_length`, in place
    where the caller binds both names to one buffer. The mask [B,1,L,T] is explicit because readers
    of `Attention` disagree about its causal alignment and drop its length input.

    Where groups of query heads are large enough, every head of keys is a row of its own: the kernel
    of TensorRT for RTX takes one head of keys for all queries, and would otherwise write all keys
    and values once for every query head.
    """
    graph, config, mask = layer.graph, layer.config, chunk.seen
    q, k, v = _projected(layer, u)
    where, cache = graph.input(PAST_LENGTH), graph.input(past_key(layer.number))
    keys = graph.op("TensorScatter", cache, k, where, axis=-2)
    values = graph.op("TensorScatter", graph.input(past_value(layer.number)), v, where, axis=-2)
    graph.output(present_key(layer.number), keys)
    graph.output(present_value(layer.number), values)
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    scale = 1.0 / math.sqrt(size)
    if not splits_groups(config):
        return _merged(layer, graph.op("Attention", q, keys, values, mask, scale=scale))

    length = graph.shared("chunk", lambda: graph.op("Shape", graph.input(TOKENS), start=1, end=2))
    # Of the cache as it comes in: its shape serves all layers, and a graph that is cut between them
    # must not compute the layer that it would otherwise be taken from.
    capacity = _capacity(layer, cache)
    q = graph.reshape(q, -1, heads // groups, length, size)
    keys = graph.reshape(keys, -1, 1, capacity, size)
    values = graph.reshape(values, -1, 1, capacity, size)

    def of_heads() -> ir.Value:
        every = graph.op("Expand", mask, graph.constant([1, groups, 1, 1]))
        return graph.reshape(every, -1, 1, length, capacity)

    mask = graph.shared("mask of heads", of_heads)
    out = graph.op("Attention", q, keys, values, mask, scale=scale)
    return _merged(layer, graph.reshape(out, -1, heads, length, size))


def denoiser_attention(layer: Layer, u: ir.Value, chunk: ChunkInfo) -> ir.Value:
    """Attention of a block u [B,S,D] over the context's cache [B,KV,T,hd] and the whole block.

    The two segments meet in the softmax only: concatenating the caches would copy every key and
    value of the context in every step of every layer.

    Rows and heads of keys are one axis, [B*KV,...]: TensorRT reads a transposed operand in place in
    a product with one such axis, and copies all keys in one with two. The query heads of a group
    are more rows of one product.
    """
    graph, config = layer.graph, layer.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = _projected(layer, u)
    length = graph.shared("block", lambda: graph.op("Shape", graph.input(BLOCK), start=1, end=2))
    each = graph.constant([heads // groups])
    rows = graph.shared("query rows", lambda: graph.op("Mul", length, each))
    q = graph.op("Mul", q, graph.scalar(1.0 / math.sqrt(size)))
    q = graph.reshape(q, -1, rows, size)
    k = graph.reshape(k, -1, length, size)
    v = graph.reshape(v, -1, length, size)
    keys, values = graph.input(past_key(layer.number)), graph.input(past_value(layer.number))
    capacity = _capacity(layer, keys)
    keys = graph.reshape(keys, -1, capacity, size)
    values = graph.reshape(values, -1, capacity, size)

    def scores(keys: ir.Value) -> ir.Value:
        transposed = graph.op("Transpose", keys, perm=[0, 2, 1])
        products = graph.op("MatMul", q, transposed)
        return graph.to_float32(products)

    # The lesser of the two and no selection: an infinite score of a place without a token goes too,
    # and ONNX Runtime does it many times as fast.
    before = graph.op("Min", scores(keys), chunk.seen)
    weight = graph.op("Concat", before, scores(k), axis=-1)
    weight = graph.op("Softmax", weight, axis=-1)
    weight = graph.to_model_dtype(weight)
    start, end, axis = graph.constant([0]), graph.constant([2**62]), graph.constant([2])
    seen = graph.op("Slice", weight, start, capacity, axis)
    seen = graph.op("MatMul", seen, values)
    own = graph.op("Slice", weight, capacity, end, axis)
    own = graph.op("MatMul", own, v)
    out = graph.op("Add", seen, own)
    out = graph.reshape(out, -1, heads, length, size)
    return _merged(layer, out)


def _projected(layer: Layer, u: ir.Value) -> Sequence[ir.Value]:
    """Queries [B,H,L,hd], keys and values [B,KV,L,hd] of u [B,L,D], in one product."""
    graph, config = layer.graph, layer.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    joined = graph.linear(u, layer.weight("qkv_proj.weight"))
    split = graph.reshape(joined, 0, 0, heads + 2 * groups, config.head_dim)
    split = graph.op("Transpose", split, perm=[0, 2, 1, 3])
    return graph.ops("Split", 3, split, graph.constant([heads, groups, groups]), axis=1)


def _capacity(layer: Layer, cache: ir.Value) -> ir.Value:
    """T, [1] int64."""
    return layer.graph.shared("capacity", lambda: layer.graph.op("Shape", cache, start=2, end=3))


def _merged(layer: Layer, x: ir.Value) -> ir.Value:
    """The output [B,L,D] of heads [B,H,L,hd]."""
    graph = layer.graph
    x = graph.op("Transpose", x, perm=[0, 2, 1, 3])
    x = graph.reshape(x, 0, 0, -1)
    return graph.linear(x, layer.weight("o_proj.weight"))
