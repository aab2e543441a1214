"""The Mamba-2 mixer as matrix products over a chunk, seeded with convolution and SSM state, scanned in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graphs.layers import LayerWeights
from twotower.export.graphs.recorder import GraphBuilder

__all__ = ["ChunkInfo", "MambaOutput", "mamba"]


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What the mixers need to know of a chunk.

    Attributes:
        length: L, [1] int64.
        future: [L,L] float32, -inf where the second position is after the first and 0 elsewhere.
        until: [L,L] float32, 1 where the second position is not after the first and 0 elsewhere.
        valid: [B,1,L] float32, 1 for a token and 0 for padding; None where nothing is padded (the
            denoiser's block).
        lengths: [B] int64 valid tokens; None where the state after the chunk is not wanted.
    """

    length: ir.Value
    future: ir.Value
    until: ir.Value
    valid: ir.Value | None
    lengths: ir.Value | None


@dataclass(frozen=True, slots=True)
class MambaOutput:
    """The mixer's output [B,L,D] and, where asked for, the states after the chunk's last valid token."""

    y: ir.Value
    conv: ir.Value | None
    ssm: ir.Value | None


def mamba(
    graph: GraphBuilder,
    u: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
    *,
    past: tuple[ir.Value, ir.Value],
    chunk: ChunkInfo,
) -> MambaOutput:
    """Mamba-2 on u [B,L,D] from past = (conv [B,K-1,C], ssm [B,H,P,N] float32)."""
    z, rows, dt = _projected(graph, u, weights, config)
    rows = graph.op("Concat", past[0], rows, axis=1)  # [B,K-1+L,C]
    conv = None if chunk.lengths is None else _conv_state(graph, rows, chunk.lengths, config)
    mixed = _convolved(graph, rows, weights, config)
    y, ssm = _scan(graph, (mixed, dt), weights, config, past_ssm=past[1], chunk=chunk)
    y = _gated_norm(graph, y, z, weights, config)
    out = weights("out_proj.weight", config.hidden_size, config.mamba_inner)
    return MambaOutput(graph.linear(y, out), conv, ssm)


def _projected(
    graph: GraphBuilder, u: ir.Value, weights: LayerWeights, config: ModelConfig
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The gate z, the rows [B,L,C] of the convolution, and the raw dt of u [B,L,D].

    One product, unless it is quantized: the few rows that make dt then stay as they are, because dt
    goes through two exponentials.
    """
    inner, channels, heads = config.mamba_inner, config.conv_channels, config.mamba_num_heads
    total, width = inner + channels + heads, config.hidden_size
    if not weights.is_quantized("in_proj.weight"):
        projected = graph.linear(u, weights("in_proj.weight", total, width))
        parts = graph.constant([inner, channels, heads])
        z, rows, dt = graph.ops("Split", 3, projected, parts, axis=-1)
        return z, rows, dt
    dt = graph.linear_exact(
        u, weights.rows("in_proj.weight", inner + channels, total, width, suffix=".dt")
    )
    projected = graph.linear(u, weights.rows("in_proj.weight", 0, inner + channels, width))
    z, rows = graph.ops("Split", 2, projected, graph.constant([inner, channels]), axis=-1)
    return z, rows, dt


def _convolved(
    graph: GraphBuilder,
    rows: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
) -> ir.Value:
    """Depthwise causal convolution and SiLU of [B,K-1+L,C]: float32 [B,L,C].

    A product for each tap: they fuse with the transposes and the SiLU around them into one kernel,
    where Conv is one of its own between two others.
    """
    channels, width = config.conv_channels, config.conv_kernel
    kernel = weights.transposed("conv1d.weight", width, channels)
    taps = graph.ops("Split", width, kernel, axis=0, num_outputs=width)
    terms = []
    for j, tap in enumerate(taps):
        start, end = graph.constant([j]), graph.constant([j + 1 - width or 2**62])
        part = graph.op("Slice", rows, start, end, graph.constant([1]))  # [B,L,C]
        terms.append(graph.op("Mul", part, tap))
    if config.use_conv_bias:
        terms.append(weights("conv1d.bias", channels))
    return graph.to_float32(graph.silu(graph.op("Sum", *terms)))


def _conv_state(
    graph: GraphBuilder,
    rows: ir.Value,
    lengths: ir.Value,
    config: ModelConfig,
) -> ir.Value:
    """The last K-1 raw rows before each text's end: [n, n+K-1) of [B,K-1+L,C], n valid tokens."""

    def places() -> ir.Value:
        offsets = graph.constant([[[i] for i in range(config.conv_kernel - 1)]])
        return graph.op("Add", graph.op("Unsqueeze", lengths, graph.constant([1, 2])), offsets)

    return graph.op("GatherND", rows, graph.shared("conv state", places), batch_dims=1)


def _scan(
    graph: GraphBuilder,
    inputs: tuple[ir.Value, ir.Value],
    weights: LayerWeights,
    config: ModelConfig,
    *,
    past_ssm: ir.Value,
    chunk: ChunkInfo,
) -> tuple[ir.Value, ir.Value | None]:
    """The state-space recurrence over a whole chunk, all in float32.

    `inputs` is x, B and C side by side and convolved [B,L,HP+2GN] float32, and the raw dt [B,L,H].

    Returns:
        y [B,L,HP] float32 and, if the chunk wants it, the new state [B,H,P,N].
    """
    g, n, p = config.n_groups, config.ssm_state_size, config.mamba_head_dim
    h, last = config.mamba_num_heads // g, graph.constant([-1])
    x, bc = graph.ops("Split", 2, inputs[0], graph.constant([g * h * p, 2 * g * n]), axis=-1)
    x = graph.op("Transpose", graph.reshape(x, 0, 0, g, h, p), perm=[0, 2, 3, 1, 4])
    # The heads of a group share B and C. Rows and groups are one axis, [B*G,L,N]: TensorRT reads a
    # transposed operand where it lies in a product with one such axis, and copies it in one with
    # two. One of those operands is the state.
    bc = graph.op("Transpose", graph.reshape(bc, 0, 0, 2 * g, n), perm=[0, 2, 1, 3])
    both = graph.ops("Split", 2, bc, axis=1, num_outputs=2)
    b, c = (graph.reshape(part, -1, chunk.length, n) for part in both)
    dt, decay = _time_steps(graph, inputs[1], weights, config, chunk=chunk)  # [B,G,H/G,L] each
    x_dt = graph.op("Mul", x, graph.op("Unsqueeze", dt, last))

    # Inside the chunk: position t sees s <= t through exp(decay_t - decay_s). Masked before exp:
    # above the diagonal the exponent is positive and would overflow. It is finite, so adding -inf
    # masks as well as selecting does, and ONNX Runtime adds nearly 20 times as fast.
    decay_t = graph.op("Unsqueeze", decay, last)
    exponent = graph.op("Sub", decay_t, graph.op("Unsqueeze", decay, graph.constant([-2])))
    within = graph.op("Exp", graph.op("Add", exponent, chunk.future))
    similarity = graph.op("MatMul", c, graph.op("Transpose", b, perm=[0, 2, 1]))  # [B*G,L,L]
    similarity = graph.reshape(similarity, -1, g, 1, chunk.length, chunk.length)
    y = graph.op("MatMul", graph.op("Mul", similarity, within), x_dt)
    # From before the chunk: the old state, decayed to t.
    state = graph.op("Transpose", graph.reshape(past_ssm, -1, h * p, n), perm=[0, 2, 1])
    carried = graph.reshape(graph.op("MatMul", c, state), -1, g, chunk.length, h, p)
    carried = graph.op("Transpose", carried, perm=[0, 1, 3, 2, 4])
    y = graph.op("Add", y, graph.op("Mul", carried, graph.op("Exp", decay_t)))
    y = graph.op("Add", y, graph.op("Mul", x, weights("D", g, h, 1, 1, dtype="float32")))
    y = graph.reshape(graph.op("Transpose", y, perm=[0, 3, 1, 2, 4]), 0, 0, config.mamba_inner)
    if chunk.lengths is None:
        return y, None
    return y, _new_state(graph, (x, dt, decay, b), config, past_ssm=past_ssm, chunk=chunk)


def _new_state(
    graph: GraphBuilder,
    inputs: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
    config: ModelConfig,
    *,
    past_ssm: ir.Value,
    chunk: ChunkInfo,
) -> ir.Value:
    """The state [B,H,P,N] after the chunk: the old one decayed over all of it, and what it adds.

    `inputs` is x [B,G,H/G,L,P], dt and decay [B,G,H/G,L], and B [B*G,L,N].
    """
    x, dt, decay, b = inputs
    g, n, p = config.n_groups, config.ssm_state_size, config.mamba_head_dim
    h, last = config.mamba_num_heads // g, graph.constant([-1])
    total = graph.op("Slice", decay, last, graph.constant([2**62]), graph.constant([3]))
    to_end = graph.op("Mul", dt, graph.op("Exp", graph.op("Sub", total, decay)))
    gained = graph.op("Mul", x, graph.op("Unsqueeze", to_end, last))
    gained = graph.op("Transpose", gained, perm=[0, 1, 3, 2, 4])
    gained = graph.reshape(gained, -1, chunk.length, h * p)
    gained = graph.op("MatMul", graph.op("Transpose", gained, perm=[0, 2, 1]), b)  # [B*G,HP/G,N]
    kept = graph.op("Mul", past_ssm, graph.reshape(graph.op("Exp", total), 0, -1, 1, 1))
    return graph.op("Add", kept, graph.reshape(gained, -1, g * h, p, n))


def _time_steps(
    graph: GraphBuilder,
    raw: ir.Value,
    weights: LayerWeights,
    config: ModelConfig,
    *,
    chunk: ChunkInfo,
) -> tuple[ir.Value, ir.Value]:
    """Step sizes dt and the running sum of dt*A, both [B,G,H/G,L] float32; padding has dt 0 and so moves nothing."""
    heads, groups = config.mamba_num_heads, config.n_groups
    dt = graph.to_float32(graph.op("Transpose", raw, perm=[0, 2, 1]))  # [B,H,L]
    bias = weights("dt_bias", heads, 1, dtype="float32")
    dt = graph.op("Softplus", graph.op("Add", dt, bias))
    low, high = config.time_step_limit
    if low > 0 or high < math.inf:
        bounds = (graph.constant(low, "float32"), graph.constant(min(high, 3.0e38), "float32"))
        dt = graph.op("Clip", dt, *bounds)
    if chunk.valid is not None:
        dt = graph.op("Mul", dt, chunk.valid)
    step = graph.op("Mul", dt, weights.negated_exp("A_log", heads, 1))
    running = _running_sum(graph, step, chunk)
    split = (0, groups, heads // groups, -1)
    return graph.reshape(dt, *split), graph.reshape(running, *split)


def _running_sum(graph: GraphBuilder, x: ir.Value, chunk: ChunkInfo) -> ir.Value:
    """Running sums along the last axis of [B,H,L]; TensorRT miscompiles the operator for them.

    Over a block they are sums of what is masked, which fuse with what is around them. Over a chunk
    of any length that would be L x L numbers a head, and a product is faster.
    """
    if chunk.lengths is not None:
        return graph.op("MatMul", x, graph.op("Transpose", chunk.until, perm=[1, 0]))
    masked = graph.op("Mul", graph.op("Unsqueeze", x, graph.constant([-2])), chunk.until)
    return graph.op("ReduceSum", masked, graph.constant([-1]), keepdims=0)


def _gated_norm(
    graph: GraphBuilder, y: ir.Value, z: ir.Value, weights: LayerWeights, config: ModelConfig
) -> ir.Value:
    """RMSNorm of y * silu(z) within each group of HP/G channels; the gate comes first. y is float32, z the model's dtype."""
    inner, groups = config.mamba_inner, config.n_groups
    size = inner // groups
    gated = graph.op("Mul", y, graph.silu(graph.to_float32(z)))
    ones = graph.constant([1.0] * size, "float32")
    normed = graph.op(
        "RMSNormalization",
        graph.reshape(gated, 0, 0, groups, size),
        ones,
        axis=-1,
        epsilon=config.layer_norm_epsilon,
    )
    scaled = graph.op(
        "Mul", graph.reshape(normed, 0, 0, inner), weights("norm.weight", inner, dtype="float32")
    )
    return graph.to_model_dtype(scaled)
