"""The mixture of experts: a dense routing matrix over experts that all compute every token."""

from __future__ import annotations

import math

import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graphs.builder import GraphBuilder
from twotower.export.graphs.layers import LayerWeights, mlp, squared_relu

__all__ = ["moe"]


def moe(graph: GraphBuilder, x: ir.Value, weights: LayerWeights, config: ModelConfig) -> ir.Value:
    """The mixture-of-experts mixer on x [B,L,D].

    Every expert computes every token and a dense routing matrix [N,E] weighs the results: exact, of static shape and
    without scatter-add or data-dependent dispatch, which TensorRT cannot take. A block of 16 tokens touches more than half
    of 128 experts anyway.
    """
    e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    tokens = graph.reshape(x, 1, -1, d)
    routing = _routing(graph, tokens, weights, config)
    up = weights.stacked("experts.{}.up_proj.weight", e, f, d)
    down = weights.stacked("experts.{}.down_proj.weight", e, d, f)
    hidden = squared_relu(graph, graph.linear(tokens, up))
    each = graph.linear(hidden, down, visited=routing)  # [E,N,D]
    zero = graph.constant(0.0, "float32")
    # Selected and not only multiplied: what nobody chose may overflow, and infinity times 0 is NaN.
    unused = graph.op("Equal", routing, zero)
    weighed = graph.op("Where", unused, zero, graph.op("Mul", graph.to_float32(each), routing))
    routed = graph.to_model_dtype(graph.op("ReduceSum", weighed, graph.constant([0]), keepdims=0))
    routed = graph.op("Reshape", routed, graph.op("Shape", x))
    if not config.shared_intermediate:
        return routed
    shared = config.shared_intermediate
    pair = (weights("shared_experts.up_proj.weight", shared, d), weights("shared_experts.down_proj.weight", d, shared))
    return graph.op("Add", routed, mlp(graph, x, pair))


def _routing(graph: GraphBuilder, tokens: ir.Value, weights: LayerWeights, config: ModelConfig) -> ir.Value:
    """Routing weights [E,N,1] in float32, zero where a token does not visit an expert; `tokens` is [1,N,D]."""
    e, k = config.n_routed_experts, config.num_experts_per_tok
    gate = weights("gate.weight", e, config.hidden_size, dtype="float32")
    bias = weights("gate.e_score_correction_bias", e, dtype="float32")
    rows = graph.reshape(graph.to_float32(tokens), -1, config.hidden_size)
    scores = graph.op("Sigmoid", graph.linear(rows, gate))  # [N,E]
    choice = graph.op("Add", scores, bias)
    if config.n_group > 1:
        choice = _within_best_groups(graph, choice, config)
    _, chosen = graph.ops("TopK", 2, choice, graph.constant([k]), axis=-1)
    share = graph.op("GatherElements", scores, chosen, axis=-1)
    if config.norm_topk_prob:
        total = graph.op("ReduceSum", share, graph.constant([-1]), keepdims=1)
        share = graph.op("Div", share, graph.op("Add", total, graph.constant(1e-20, "float32")))
    share = graph.op("Mul", share, graph.constant(config.routed_scaling_factor, "float32"))
    zeros = graph.op("Mul", scores, graph.constant(0.0, "float32"))
    dense = graph.op("ScatterElements", zeros, chosen, share, axis=-1)
    return graph.op("Unsqueeze", graph.op("Transpose", dense, perm=[1, 0]), graph.constant([-1]))


def _within_best_groups(graph: GraphBuilder, choice: ir.Value, config: ModelConfig) -> ir.Value:
    """Scores [N,E] with -inf outside the `topk_group` groups whose two best scores sum highest."""
    groups, size = config.n_group, config.n_routed_experts // config.n_group
    by_group = graph.reshape(choice, -1, groups, size)
    best, _ = graph.ops("TopK", 2, by_group, graph.constant([min(2, size)]), axis=-1)
    group_score = graph.op("ReduceSum", best, graph.constant([-1]), keepdims=0)  # [N, groups]
    _, kept = graph.ops("TopK", 2, group_score, graph.constant([config.topk_group]), axis=-1)
    ones = graph.op("Equal", kept, kept)
    none = graph.op("Less", group_score, graph.constant(-math.inf, "float32"))
    mask = graph.op("ScatterElements", none, kept, ones, axis=-1)
    visible = graph.op("Unsqueeze", mask, graph.constant([-1]))
    limited = graph.op("Where", visible, by_group, graph.constant(-math.inf, "float32"))
    return graph.reshape(limited, -1, config.n_routed_experts)
