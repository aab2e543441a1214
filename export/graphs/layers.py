"""What layers are made of besides Mamba: norms, conditioning, attention, MLP and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twotower.checkpoint.layout import TIMESTEP_FREQUENCIES
from twotower.config import LayerKind
from twotower.export.graphs.recorder import ChunkInfo, GraphBuilder, Layer
from twotower.spec import (
    BLOCK,
    EXPERTS_IN,
    EXPERTS_OUT,
    PAST_LENGTH,
    SHARES,
    TOKENS,
    past_key,
    past_value,
    present_key,
    present_value,
    splits_groups,
)


def rms_norm(
    layer: Layer,
    x: ir.Value,
    weight: str = "norm.weight",
) -> ir.Value:
    """RMSNorm over the last axis, in float32, cast back to the model's dtype."""
    graph, scale, epsilon = layer.graph, layer.weight(weight), layer.config.layer_norm_epsilon
    wide = graph.to_float32(x)
    normed = graph.op("RMSNormalization", wide, scale, axis=-1, epsilon=epsilon)
    return graph.to_model_dtype(normed)


def mlp(
    layer: Layer,
    x: ir.Value,
    name: str = "",
) -> ir.Value:
    """down(relu(up(x))^2), the non-gated MLP of dense layers and of the shared expert."""
    up = layer.weight(f"{name}up_proj.weight")
    down = layer.weight(f"{name}down_proj.weight")
    return layer.graph.linear(_squared_relu(layer.graph, layer.graph.linear(x, up)), down)


def _squared_relu(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    positive = graph.op("Relu", x)
    return graph.op("Mul", positive, positive)


@dataclass(frozen=True, slots=True)
class Modulation:
    """One layer's adaptive normalisation, [B,1,D] each; `scale` already holds 1 + scale."""

    shift: ir.Value
    scale: ir.Value
    gate: ir.Value


def conditioning(model: Layer, masked_fraction: ir.Value) -> ir.Value:
    """The conditioning [B,3,D] all layers share, from t [B] float32 in [0,1]."""
    graph = model.graph

    def affine(x: ir.Value, name: str) -> ir.Value:
        weight, bias = model.weight(f"{name}.weight"), model.weight(f"{name}.bias")
        return graph.op("Gemm", x, weight, bias, transB=1)

    # The published model rounds t to its own dtype before the factor 1000, and multiplies in this
    # order: angles reach 1000, where another order of rounding moves the embedding by more than the
    # rest of the float32 arithmetic does.
    t = graph.to_float32(graph.to_model_dtype(masked_fraction))
    t = graph.unsqueeze(t, 1)
    scaled = graph.op("Mul", t, graph.constant(1000.0, "float32"))
    count = np.float32(TIMESTEP_FREQUENCIES)
    exponents = np.arange(TIMESTEP_FREQUENCIES, dtype=np.float32)
    exponents = exponents * np.float32(-math.log(10000.0)) / count
    # In float64 and rounded after: numpy's float32 exp is off by an ulp in half the places.
    rates = np.exp(exponents.astype(np.float64))
    angles = graph.op(
        "Mul",
        scaled,
        graph.constant(rates[None], "float32"),
    )
    waves = graph.op(
        "Concat",
        graph.op("Cos", angles),
        graph.op("Sin", angles),
        axis=-1,
    )
    e = affine(graph.to_model_dtype(waves), "t_embedder.mlp.0")
    e = affine(graph.silu(e), "t_embedder.mlp.2")
    return graph.reshape(
        affine(graph.silu(e), "t_block.1"),
        0,
        3,
        model.config.hidden_size,
    )


def modulation(
    model: Layer,
    shared: ir.Value,
    layer: int,
) -> Modulation:
    """Shift, scale and gate of one layer: its table plus the shared conditioning."""
    graph, table = model.graph, model.weight(f"scale_shift_tables.{layer}")
    summed = graph.op("Add", shared, table)
    shift, scale, gate = graph.ops("Split", 3, summed, axis=1, num_outputs=3)
    return Modulation(
        shift,
        graph.op("Add", scale, graph.scalar(1.0)),
        gate,
    )


def normed_input(
    layer: Layer,
    h: ir.Value,
    by: Modulation,
) -> ir.Value:
    """What a mixer reads: Mamba and attention modulate, then norm; MoE and MLP norm first."""
    graph, kind = layer.graph, layer.config.layers[layer.number]

    def modulated(x: ir.Value) -> ir.Value:
        return graph.op(
            "Add",
            graph.op("Mul", x, by.scale),
            by.shift,
        )

    if kind in (LayerKind.MAMBA, LayerKind.ATTENTION):
        return rms_norm(layer, modulated(h))
    return modulated(rms_norm(layer, h))


def moe(layer: Layer, x: ir.Value) -> ir.Value:
    """The mixture-of-experts mixer on x [B,L,D].

    Every expert computes every token and a dense routing matrix [N,E] weighs the results: exact, of
    static shape, without scatter-add or data-dependent dispatch, which TensorRT cannot take. A
    block of 16 tokens touches more than half of 128 experts anyway. The mixer's input, the shares
    and the result have names by which a builder can take the experts out.
    """
    graph, config = layer.graph, layer.config
    graph.mark(EXPERTS_IN, x)
    tokens = graph.reshape(x, 1, -1, config.hidden_size)
    chosen, share = routing(layer, tokens)
    up = layer.weight("experts.up_proj.weight")
    down = layer.weight("experts.down_proj.weight")
    hidden = _squared_relu(graph, graph.linear(tokens, up))
    each = graph.linear(hidden, down, visited=share)  # [E,N,D]
    # Selected and not only multiplied: what nobody chose may overflow, and infinity times 0 is NaN.
    weighed = graph.op("Mul", graph.to_float32(each), share)
    weighed = graph.op(
        "Where",
        chosen,
        weighed,
        graph.constant(0.0, "float32"),
    )
    routed = graph.to_model_dtype(graph.sum(weighed, 0))
    routed = graph.op("Reshape", routed, graph.op("Shape", x))
    if config.shared_intermediate:
        routed = graph.op(
            "Add",
            routed,
            mlp(layer, x, "shared_experts."),
        )
    return graph.mark(EXPERTS_OUT, routed)


def routing(layer: Layer, tokens: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Experts each of `tokens` [1,N,D] visits, [E,N,1] bool, and float32 shares, 0 elsewhere."""
    graph, config = layer.graph, layer.config
    zero = graph.constant(0.0, "float32")
    gate = layer.weight("gate.weight")
    bias = layer.weight("gate.e_score_correction_bias")
    rows = graph.reshape(
        graph.to_float32(tokens),
        -1,
        config.hidden_size,
    )
    scores = graph.op("Sigmoid", graph.linear(rows, gate))
    scores = graph.op("Transpose", scores, perm=[1, 0])  # [E,N]
    choice = graph.op("Add", scores, bias)
    if config.n_group > 1:
        choice = within_best_groups(layer, choice)
    places = _places(graph, choice, choice, config.n_routed_experts)
    chosen = graph.op(
        "Less",
        places,
        graph.constant(config.num_experts_per_tok, "float32"),
    )
    share = graph.op("Where", chosen, scores, zero)
    if config.norm_topk_prob:
        total = graph.sum(share, 0, keepdims=1)
        share = graph.op(
            "Div",
            share,
            graph.op("Add", total, graph.constant(1e-20, "float32")),
        )
    share = graph.op(
        "Mul",
        share,
        graph.constant(config.routed_scaling_factor, "float32"),
    )
    graph.mark(SHARES, share)
    last = graph.constant([-1])
    return graph.op("Unsqueeze", chosen, last), graph.op("Unsqueeze", share, last)


def _places(
    graph: GraphBuilder,
    x: ir.Value,
    other: ir.Value,
    count: int,
) -> ir.Value:
    """How many come before each of x [...,count,N] in descending order along its last axis but one.

    Of equal values the first comes first, as with TopK. On a GPU comparing all pairs is part of one
    kernel; TopK and a scatter of its result are one each. `other` is x so that it broadcasts to
    [...,count,count,N]; the result is [...,count,N] float32.
    """
    zero, one = graph.constant(0.0, "float32"), graph.constant(1.0, "float32")
    earlier = graph.constant(np.tri(count, k=-1)[..., None], "float32")  # [mine,other,1]
    mine = graph.unsqueeze(x, -2)
    ahead = graph.op(
        "Where",
        graph.op("Equal", other, mine),
        earlier,
        zero,
    )
    ahead = graph.op(
        "Where",
        graph.op("Greater", other, mine),
        one,
        ahead,
    )
    return graph.sum(ahead, -2)


def within_best_groups(layer: Layer, choice: ir.Value) -> ir.Value:
    """Scores [E,N] with -inf outside the `topk_group` groups whose two best scores sum highest."""
    graph, config = layer.graph, layer.config
    groups, size = config.n_group, config.n_routed_experts // config.n_group
    by_group = graph.reshape(choice, groups, size, -1)
    other = graph.unsqueeze(by_group, 1)  # [groups,1,size,N]
    places = _places(graph, by_group, other, size)
    best = graph.op("Less", places, graph.constant(2.0, "float32"))
    best = graph.op(
        "Where",
        best,
        by_group,
        graph.constant(0.0, "float32"),
    )
    of_group = graph.sum(best, 1)  # [groups,N]
    places = _places(graph, of_group, of_group, groups)
    kept = graph.op(
        "Less",
        places,
        graph.constant(config.topk_group, "float32"),
    )
    kept = graph.unsqueeze(kept, 1)
    limited = graph.op(
        "Where",
        kept,
        by_group,
        graph.constant(-math.inf, "float32"),
    )
    return graph.reshape(limited, config.n_routed_experts, -1)


MASKED = -1e30
"""The float32 score of a position that must not be attended: finite, so that no backend has to do
arithmetic with -inf."""


def context_attention(
    layer: Layer,
    u: ir.Value,
    chunk: ChunkInfo,
) -> ir.Value:
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
    values = graph.op(
        "TensorScatter",
        graph.input(past_value(layer.number)),
        v,
        where,
        axis=-2,
    )
    graph.output(present_key(layer.number), keys)
    graph.output(present_value(layer.number), values)
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    scale = 1.0 / math.sqrt(size)
    if not splits_groups(config):
        return _merged(layer, graph.op("Attention", q, keys, values, mask, scale=scale))

    length = graph.shared("chunk", lambda: graph.size(graph.input(TOKENS), 1))
    # Of the cache as it comes in: its shape serves all layers, and a graph that is cut between them
    # must not compute the layer that it would otherwise be taken from.
    capacity = _capacity(layer, cache)
    q = graph.reshape(q, -1, heads // groups, length, size)
    keys = graph.reshape(keys, -1, 1, capacity, size)
    values = graph.reshape(values, -1, 1, capacity, size)

    def of_heads() -> ir.Value:
        every = graph.op(
            "Expand",
            mask,
            graph.constant([1, groups, 1, 1]),
        )
        return graph.reshape(every, -1, 1, length, capacity)

    mask = graph.shared("mask of heads", of_heads)
    out = graph.op("Attention", q, keys, values, mask, scale=scale)
    return _merged(layer, graph.reshape(out, -1, heads, length, size))


def denoiser_attention(
    layer: Layer,
    u: ir.Value,
    chunk: ChunkInfo,
) -> ir.Value:
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
    length = graph.shared("block", lambda: graph.size(graph.input(BLOCK), 1))
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
    split = graph.reshape(
        joined,
        0,
        0,
        heads + 2 * groups,
        config.head_dim,
    )
    split = graph.op("Transpose", split, perm=[0, 2, 1, 3])
    return graph.ops(
        "Split",
        3,
        split,
        graph.constant([heads, groups, groups]),
        axis=1,
    )


def _capacity(layer: Layer, cache: ir.Value) -> ir.Value:
    """T, [1] int64."""
    return layer.graph.shared("capacity", lambda: layer.graph.size(cache, 2))


def _merged(layer: Layer, x: ir.Value) -> ir.Value:
    """The output [B,L,D] of heads [B,H,L,hd]."""
    graph = layer.graph
    x = graph.op("Transpose", x, perm=[0, 2, 1, 3])
    x = graph.reshape(x, 0, 0, -1)
    return graph.linear(x, layer.weight("o_proj.weight"))
