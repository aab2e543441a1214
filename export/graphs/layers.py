"""What layers are made of besides attention and Mamba: norms, weights by name, the conditioning, the MLP, and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twotower.checkpoint.layout import TIMESTEP_FREQUENCIES
from twotower.config import LayerKind, ModelConfig
from twotower.export.graphs.recorder import GraphBuilder
from twotower.spec import EXPERTS_IN, EXPERTS_OUT, SHARES
from twotower.weights.declared import Weight

__all__ = [
    "LayerWeights",
    "Modulation",
    "conditioning",
    "mlp",
    "modulation",
    "moe",
    "normed_input",
    "rms_norm",
    "squared_relu",
]


class LayerWeights:
    """Declares the weights below one checkpoint prefix.

    Args:
        graph: Where they are declared.
        prefix: For example `context_tower.layers.3.mixer.`.
    """

    def __init__(self, graph: GraphBuilder, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix

    def __call__(self, name: str, *shape: int, dtype: str | None = None) -> ir.Value:
        """One checkpoint tensor, in the model's dtype unless another is named."""
        full = self._prefix + name
        return self._graph.weight(Weight(full, shape, dtype or self._graph.dtype, (full,)))

    def rows(self, name: str, first: int, end: int, columns: int, *, suffix: str = "") -> ir.Value:
        """Rows [first, end) of a matrix, under its own name; with a suffix under that, and never quantized."""
        full = self._prefix + name
        origin = f"{full}{suffix}"
        return self._graph.weight(
            Weight(
                origin,
                (end - first, columns),
                self._graph.dtype,
                (full,),
                rows=(first, end),
                origin=origin,
            )
        )

    def is_quantized(self, name: str) -> bool:
        """Whether the weight is to be stored in few bits."""
        return self._prefix + name in self._graph.precision.weights

    def negated_exp(self, name: str, *shape: int) -> ir.Value:
        """-exp of a tensor in float32: the decay rates A, computed once at export."""
        full = self._prefix + name
        return self._graph.weight(
            Weight(f"{full}.negated_exp", shape, "float32", (full,), negated_exp=True)
        )

    def transposed(self, name: str, *shape: int) -> ir.Value:
        """A small tensor with its last axis first, reordered at export; `shape` is the result's."""
        full = self._prefix + name
        weight = Weight(f"{full}.transposed", shape, self._graph.dtype, (full,), transposed=True)
        return self._graph.weight(weight)

    def joined(self, name: str, parts: Sequence[str], *shape: int) -> ir.Value:
        """Matrices with equally long rows, one below the other as one weight."""
        sources = tuple(self._prefix + part for part in parts)
        return self._graph.weight(Weight(self._prefix + name, shape, self._graph.dtype, sources))

    def stacked(self, pattern: str, count: int, *shape: int) -> ir.Value:
        """The tensors `pattern.format(0..count-1)` along a new first axis."""
        sources = tuple(self._prefix + pattern.format(j) for j in range(count))
        name = self._prefix + pattern.replace("{}.", "")
        return self._graph.weight(Weight(name, (count, *shape), self._graph.dtype, sources))


def rms_norm(graph: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """RMSNorm over the last axis, in float32 (`weight` is float32), cast back to the model's dtype."""
    normed = graph.op("RMSNormalization", graph.to_float32(x), weight, axis=-1, epsilon=epsilon)
    return graph.to_model_dtype(normed)


def mlp(graph: GraphBuilder, x: ir.Value, weights: tuple[ir.Value, ir.Value]) -> ir.Value:
    """down(relu(up(x))^2), the non-gated MLP of dense layers and of the shared expert."""
    up, down = weights
    return graph.linear(squared_relu(graph, graph.linear(x, up)), down)


def squared_relu(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    """relu(x)^2, elementwise."""
    positive = graph.op("Relu", x)
    return graph.op("Mul", positive, positive)


@dataclass(frozen=True, slots=True)
class Modulation:
    """One layer's adaptive normalisation, [B,1,D] each; `scale` already holds 1 + scale."""

    shift: ir.Value
    scale: ir.Value
    gate: ir.Value


def conditioning(graph: GraphBuilder, masked_fraction: ir.Value, config: ModelConfig) -> ir.Value:
    """The conditioning [B,3,D] all layers share, from t [B] float32 in [0,1]."""
    d, weights = config.hidden_size, LayerWeights(graph, "")
    # The published model rounds t to its own dtype before the factor 1000, and multiplies in this
    # order: angles reach
    # 1000, where another order of rounding moves the embedding by more than the rest of the float32
    # arithmetic does.
    t = graph.to_float32(graph.to_model_dtype(masked_fraction))
    scaled = graph.op(
        "Mul", graph.op("Unsqueeze", t, graph.constant([1])), graph.constant(1000.0, "float32")
    )
    exponents = (
        np.arange(TIMESTEP_FREQUENCIES, dtype=np.float32)
        * np.float32(-math.log(10000.0))
        / np.float32(TIMESTEP_FREQUENCIES)
    )
    rates = np.exp(
        exponents.astype(np.float64)
    )  # correctly rounded below; numpy's float32 exp is off by an ulp in half the places
    angles = graph.op("Mul", scaled, graph.constant(rates[None], "float32"))
    waves = graph.op("Concat", graph.op("Cos", angles), graph.op("Sin", angles), axis=-1)
    e = _affine(
        graph,
        graph.to_model_dtype(waves),
        weights,
        ("t_embedder.mlp.0", d, 2 * TIMESTEP_FREQUENCIES),
    )
    e = _affine(graph, graph.silu(e), weights, ("t_embedder.mlp.2", d, d))
    m = _affine(graph, graph.silu(e), weights, ("t_block.1", 3 * d, d))
    return graph.reshape(m, 0, 3, d)


def modulation(
    graph: GraphBuilder, shared: ir.Value, config: ModelConfig, layer: int
) -> Modulation:
    """Shift, scale and gate of one layer: its table plus the shared conditioning."""
    table = LayerWeights(graph, "")(f"scale_shift_tables.{layer}", 3, config.hidden_size)
    shift, scale, gate = graph.ops(
        "Split", 3, graph.op("Add", shared, table), axis=1, num_outputs=3
    )
    return Modulation(shift, graph.op("Add", scale, graph.scalar(1.0)), gate)


def normed_input(
    graph: GraphBuilder,
    h: ir.Value,
    norm: ir.Value,
    kind: LayerKind,
    *,
    by: Modulation,
    epsilon: float,
) -> ir.Value:
    """What a denoiser layer's mixer reads: Mamba and attention modulate and then norm, MoE and MLP the other way round."""
    if kind in (LayerKind.MAMBA, LayerKind.ATTENTION):
        return rms_norm(graph, _modulated(graph, h, by), norm, epsilon)
    return _modulated(graph, rms_norm(graph, h, norm, epsilon), by)


def _modulated(graph: GraphBuilder, x: ir.Value, by: Modulation) -> ir.Value:
    return graph.op("Add", graph.op("Mul", x, by.scale), by.shift)


def _affine(
    graph: GraphBuilder, x: ir.Value, weights: LayerWeights, layer: tuple[str, int, int]
) -> ir.Value:
    name, out, into = layer
    weight, bias = weights(f"{name}.weight", out, into), weights(f"{name}.bias", 1, out)
    return graph.op("Gemm", x, weight, bias, transB=1)


def moe(graph: GraphBuilder, x: ir.Value, weights: LayerWeights, config: ModelConfig) -> ir.Value:
    """The mixture-of-experts mixer on x [B,L,D].

    Every expert computes every token and a dense routing matrix [N,E] weighs the results: exact, of
    static shape and without scatter-add or data-dependent dispatch, which TensorRT cannot take. A
    block of 16 tokens touches more than half of 128 experts anyway.

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
    scores = graph.op(
        "Transpose", graph.op("Sigmoid", graph.linear(rows, gate)), perm=[1, 0]
    )  # [E,N]
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
    best = graph.op(
        "Less", _places(graph, by_group, other, count=size), graph.constant(2.0, "float32")
    )
    best = graph.op("Where", best, by_group, graph.constant(0.0, "float32"))
    of_group = graph.op("ReduceSum", best, graph.constant([1]), keepdims=0)  # [groups,N]
    places = _places(graph, of_group, of_group, count=groups)
    kept = graph.op("Less", places, graph.constant(config.topk_group, "float32"))
    kept = graph.op("Unsqueeze", kept, graph.constant([1]))
    limited = graph.op("Where", kept, by_group, graph.constant(-math.inf, "float32"))
    return graph.reshape(limited, config.n_routed_experts, -1)
