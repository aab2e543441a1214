"""The mixture of experts: a dense routing matrix over experts that all compute every token."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graphs.builder import GraphBuilder
from twotower.export.graphs.layers import LayerWeights, mlp, squared_relu
from twotower.spec import EXPERTS_IN, EXPERTS_OUT, SHARES

__all__ = ["moe"]


def moe(graph: GraphBuilder, x: ir.Value, weights: LayerWeights, config: ModelConfig) -> ir.Value:
    """The mixture-of-experts mixer on x [B,L,D].

    Every expert computes every token and a dense routing matrix [N,E] weighs the results: exact, of static shape and
    without scatter-add or data-dependent dispatch, which TensorRT cannot take. A block of 16 tokens touches more than half
    of 128 experts anyway.

    Three values have names, by which a builder can take the experts out: the mixer's input, the
    shares, and the result.
    """
    graph.mark(EXPERTS_IN, x)
    e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    tokens = graph.reshape(x, 1, -1, d)
    chosen, share = _routing(graph, tokens, weights, config)
    up = weights.stacked("experts.{}.up_proj.weight", e, f, d)
    down = weights.stacked("experts.{}.down_proj.weight", e, d, f)
    hidden = squared_relu(graph, graph.linear(tokens, up))
    each = graph.linear(hidden, down, visited=share)  # [E,N,D]
    # Selected and not only multiplied: what nobody chose may overflow, and infinity times 0 is NaN.
    weighed = graph.op("Mul", graph.to_float32(each), share)
    weighed = graph.op("Where", chosen, weighed, graph.constant(0.0, "float32"))
    routed = graph.to_model_dtype(graph.op("ReduceSum", weighed, graph.constant([0]), keepdims=0))
    routed = graph.op("Reshape", routed, graph.op("Shape", x))
    if not config.shared_intermediate:
        return graph.mark(EXPERTS_OUT, routed)
    width = config.shared_intermediate
    up = weights("shared_experts.up_proj.weight", width, d)
    down = weights("shared_experts.down_proj.weight", d, width)
    return graph.mark(EXPERTS_OUT, graph.op("Add", routed, mlp(graph, x, (up, down))))


def _routing(
    graph: GraphBuilder,
    tokens: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
) -> tuple[ir.Value, ir.Value]:
    """Which experts each of `tokens` [1,N,D] visits, [E,N,1] bool, and their shares, float32.

    Shares are 0 where an expert is not visited.
    """
    e, zero = config.n_routed_experts, graph.constant(0.0, "float32")
    gate = weights("gate.weight", e, config.hidden_size, dtype="float32")
    bias = weights("gate.e_score_correction_bias", e, 1, dtype="float32")
    rows = graph.reshape(graph.to_float32(tokens), -1, config.hidden_size)
    scores = graph.op("Transpose", graph.op("Sigmoid", graph.linear(rows, gate)), perm=[1, 0])  # [E,N]
    choice = graph.op("Add", scores, bias)
    if config.n_group > 1:
        choice = _within_best_groups(graph, choice, config)
    places = _places(graph, choice, choice, count=e)
    chosen = graph.op("Less", places, graph.constant(config.num_experts_per_tok, "float32"))
    share = graph.op("Where", chosen, scores, zero)
    if config.norm_topk_prob:
        total = graph.op("ReduceSum", share, graph.constant([0]), keepdims=1)
        share = graph.op("Div", share, graph.op("Add", total, graph.constant(1e-20, "float32")))
    share = graph.op("Mul", share, graph.constant(config.routed_scaling_factor, "float32"))
    graph.mark(SHARES, share)
    last = graph.constant([-1])
    return graph.op("Unsqueeze", chosen, last), graph.op("Unsqueeze", share, last)


def _places(graph: GraphBuilder, x: ir.Value, other: ir.Value, *, count: int) -> ir.Value:
    """How many come before each of x [...,count,N] in descending order along its last axis but one.

    Of equal values the first comes first, as with TopK. On a GPU comparing all pairs is part of
    one kernel; TopK is one of its own, and so is a scatter of what it chose.

    Args:
        graph: Where it is recorded.
        x: The values.
        other: The same, so that it broadcasts to [...,count,count,N].
        count: How many are compared.

    Returns:
        [...,count,N] float32.
    """
    zero, one = graph.constant(0.0, "float32"), graph.constant(1.0, "float32")
    earlier = graph.constant(np.tri(count, k=-1)[..., None], "float32")  # [mine,other,1]
    mine = graph.op("Unsqueeze", x, graph.constant([-2]))
    ahead = graph.op("Where", graph.op("Equal", other, mine), earlier, zero)
    ahead = graph.op("Where", graph.op("Greater", other, mine), one, ahead)
    return graph.op("ReduceSum", ahead, graph.constant([-2]), keepdims=0)


def _within_best_groups(graph: GraphBuilder, choice: ir.Value, config: ModelConfig) -> ir.Value:
    """Scores [E,N] with -inf outside the `topk_group` groups whose two best scores sum highest."""
    groups, size = config.n_group, config.n_routed_experts // config.n_group
    by_group = graph.reshape(choice, groups, size, -1)
    other = graph.op("Unsqueeze", by_group, graph.constant([1]))  # [groups,1,size,N]
    best = graph.op("Less", _places(graph, by_group, other, count=size), graph.constant(2.0, "float32"))
    best = graph.op("Where", best, by_group, graph.constant(0.0, "float32"))
    of_group = graph.op("ReduceSum", best, graph.constant([1]), keepdims=0)  # [groups,N]
    places = _places(graph, of_group, of_group, count=groups)
    kept = graph.op("Less", places, graph.constant(config.topk_group, "float32"))
    kept = graph.op("Unsqueeze", kept, graph.constant([1]))
    limited = graph.op("Where", kept, by_group, graph.constant(-math.inf, "float32"))
    return graph.reshape(limited, config.n_routed_experts, -1)
