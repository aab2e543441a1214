"""The Mamba-2 mixer as matrix products over a chunk, seeded with its states, scanned in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from twotower.export.graphs.recorder import ChunkInfo, Layer
from twotower.spec import past_conv, past_ssm, present_conv, present_ssm

__all__ = ["mamba"]


def mamba(layer: Layer, u: ir.Value, chunk: ChunkInfo) -> ir.Value:
    """Mamba-2 [B,L,D] on u [B,L,D], from the convolution's and the SSM's state.

    The states after the chunk's last valid token are outputs of the graph where `chunk.lengths`
    is given.
    """
    graph, config = layer.graph, layer.config
    z, rows, dt = _projected(layer, u)
    rows = graph.op("Concat", graph.input(past_conv(layer.number)), rows, axis=1)  # [B,K-1+L,C]
    if chunk.lengths is not None:
        graph.output(present_conv(layer.number), _conv_state(layer, rows, chunk.lengths))
    mixed = _convolved(layer, rows)
    y = _scan(layer, mixed, dt, chunk)

    # RMSNorm of y * silu(z) within each group of HP/G channels, in float32; the gate comes first.
    inner, groups = config.mamba_inner, config.n_groups
    gated = graph.op("Mul", y, graph.silu(graph.to_float32(z)))
    ones = graph.constant([1.0] * (inner // groups), "float32")
    gated = graph.reshape(gated, 0, 0, groups, inner // groups)
    epsilon = config.layer_norm_epsilon
    normed = graph.op("RMSNormalization", gated, ones, axis=-1, epsilon=epsilon)
    scaled = graph.op("Mul", graph.reshape(normed, 0, 0, inner), layer.weight("norm.weight"))
    return graph.linear(graph.to_model_dtype(scaled), layer.weight("out_proj.weight"))


def _projected(layer: Layer, u: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The gate z, the rows [B,L,C] of the convolution, and the raw dt of u [B,L,D].

    One product, unless it is quantized: the few rows that make dt then stay as they are, because dt
    goes through two exponentials.
    """
    graph, config = layer.graph, layer.config
    inner, channels, heads = config.mamba_inner, config.conv_channels, config.mamba_num_heads
    if not layer.has("in_proj.weight.dt"):
        projected = graph.linear(u, layer.weight("in_proj.weight"))
        parts = graph.constant([inner, channels, heads])
        z, rows, dt = graph.ops("Split", 3, projected, parts, axis=-1)
        return z, rows, dt
    dt = graph.linear_exact(u, layer.weight("in_proj.weight.dt"))
    projected = graph.linear(u, layer.weight("in_proj.weight"))
    z, rows = graph.ops("Split", 2, projected, graph.constant([inner, channels]), axis=-1)
    return z, rows, dt


def _convolved(layer: Layer, rows: ir.Value) -> ir.Value:
    """Depthwise causal convolution and SiLU of [B,K-1+L,C]: float32 [B,L,C].

    A product for each tap: they fuse with the transposes and the SiLU around them into one kernel,
    where Conv is one of its own between two others.
    """
    graph, width = layer.graph, layer.config.conv_kernel
    kernel = layer.weight("conv1d.weight.transposed")
    terms = []
    for j, tap in enumerate(graph.ops("Split", width, kernel, axis=0, num_outputs=width)):
        start, end = graph.constant([j]), graph.constant([j + 1 - width or 2**62])
        part = graph.op("Slice", rows, start, end, graph.constant([1]))  # [B,L,C]
        terms.append(graph.op("Mul", part, tap))
    if layer.config.use_conv_bias:
        terms.append(layer.weight("conv1d.bias"))
    return graph.to_float32(graph.silu(graph.op("Sum", *terms)))


def _conv_state(layer: Layer, rows: ir.Value, lengths: ir.Value) -> ir.Value:
    """The last K-1 raw rows before each text's end: [n, n+K-1) of [B,K-1+L,C], n valid tokens."""
    graph = layer.graph

    def places() -> ir.Value:
        offsets = graph.constant([[[i] for i in range(layer.config.conv_kernel - 1)]])
        return graph.op("Add", graph.op("Unsqueeze", lengths, graph.constant([1, 2])), offsets)

    return graph.op("GatherND", rows, graph.shared("conv state", places), batch_dims=1)


@dataclass(frozen=True, slots=True)
class _Steps:
    """What a scan reads: x [B,G,H/G,L,P], b [B*G,L,N], dt and the running dt*A [B,G,H/G,L]."""

    x: ir.Value
    b: ir.Value
    dt: ir.Value
    decay: ir.Value


def _scan(layer: Layer, mixed: ir.Value, raw_dt: ir.Value, chunk: ChunkInfo) -> ir.Value:
    """The state-space recurrence over a whole chunk: y [B,L,HP], all in float32.

    Args:
        layer: The mixer.
        mixed: x, B and C side by side and convolved, [B,L,HP+2GN] float32.
        raw_dt: [B,L,H].
        chunk: Where `lengths` is given, the new state is an output of the graph.
    """
    graph, config = layer.graph, layer.config
    g, n, p = config.n_groups, config.ssm_state_size, config.mamba_head_dim
    h, last = config.mamba_num_heads // g, graph.constant([-1])
    x, bc = graph.ops("Split", 2, mixed, graph.constant([g * h * p, 2 * g * n]), axis=-1)
    x = graph.op("Transpose", graph.reshape(x, 0, 0, g, h, p), perm=[0, 2, 3, 1, 4])
    # The heads of a group share B and C. Rows and groups are one axis, [B*G,L,N]: TensorRT reads a
    # transposed operand where it lies in a product with one such axis, and copies it in one with
    # two. One of those operands is the state.
    bc = graph.op("Transpose", graph.reshape(bc, 0, 0, 2 * g, n), perm=[0, 2, 1, 3])
    b, c = graph.ops("Split", 2, bc, axis=1, num_outputs=2)
    b = graph.reshape(b, -1, chunk.length, n)
    c = graph.reshape(c, -1, chunk.length, n)
    dt, decay = _time_steps(layer, raw_dt, chunk)
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
    state = graph.input(past_ssm(layer.number))
    state = graph.op("Transpose", graph.reshape(state, -1, h * p, n), perm=[0, 2, 1])
    carried = graph.reshape(graph.op("MatMul", c, state), -1, g, chunk.length, h, p)
    carried = graph.op("Transpose", carried, perm=[0, 1, 3, 2, 4])
    y = graph.op("Add", y, graph.op("Mul", carried, graph.op("Exp", decay_t)))
    y = graph.op("Add", y, graph.op("Mul", x, layer.weight("D")))
    y = graph.reshape(graph.op("Transpose", y, perm=[0, 3, 1, 2, 4]), 0, 0, config.mamba_inner)
    if chunk.lengths is not None:
        _output_state(layer, _Steps(x, b, dt, decay), chunk)
    return y


def _output_state(layer: Layer, steps: _Steps, chunk: ChunkInfo) -> None:
    """The state [B,H,P,N] after the chunk: the old one decayed over all of it, and what it adds."""
    graph, config = layer.graph, layer.config
    g, n, p = config.n_groups, config.ssm_state_size, config.mamba_head_dim
    h, last = config.mamba_num_heads // g, graph.constant([-1])
    total = graph.op("Slice", steps.decay, last, graph.constant([2**62]), graph.constant([3]))
    to_end = graph.op("Mul", steps.dt, graph.op("Exp", graph.op("Sub", total, steps.decay)))
    gained = graph.op("Mul", steps.x, graph.op("Unsqueeze", to_end, last))
    gained = graph.op("Transpose", gained, perm=[0, 1, 3, 2, 4])
    gained = graph.reshape(gained, -1, chunk.length, h * p)
    gained = graph.op("Transpose", gained, perm=[0, 2, 1])
    gained = graph.op("MatMul", gained, steps.b)  # [B*G,HP/G,N]
    factor = graph.reshape(graph.op("Exp", total), 0, -1, 1, 1)
    kept = graph.op("Mul", graph.input(past_ssm(layer.number)), factor)
    after = graph.op("Add", kept, graph.reshape(gained, -1, g * h, p, n))
    graph.output(present_ssm(layer.number), after)


def _time_steps(layer: Layer, raw: ir.Value, chunk: ChunkInfo) -> tuple[ir.Value, ir.Value]:
    """Step sizes dt and the running sum of dt*A, both [B,G,H/G,L] float32.

    Padding has dt 0 and so moves nothing.
    """
    graph, config = layer.graph, layer.config
    dt = graph.to_float32(graph.op("Transpose", raw, perm=[0, 2, 1]))  # [B,H,L]
    dt = graph.op("Softplus", graph.op("Add", dt, layer.weight("dt_bias")))
    low, high = config.time_step_limit
    if low > 0 or high < math.inf:
        least = graph.constant(low, "float32")
        dt = graph.op("Clip", dt, least, graph.constant(min(high, 3.0e38), "float32"))
    if chunk.valid is not None:
        dt = graph.op("Mul", dt, chunk.valid)
    step = graph.op("Mul", dt, layer.weight("A_log.negated_exp"))
    # Running sums without CumSum, which TensorRT miscompiles. Over a block they are sums of what is
    # masked, which fuse with what is around them. Over a chunk of any length that would be L x L
    # numbers a head, and a product is faster.
    if chunk.lengths is not None:
        running = graph.op("MatMul", step, graph.op("Transpose", chunk.until, perm=[1, 0]))
    else:
        masked = graph.op("Unsqueeze", step, graph.constant([-2]))
        masked = graph.op("Mul", masked, chunk.until)
        running = graph.op("ReduceSum", masked, graph.constant([-1]), keepdims=0)
    split = (0, config.n_groups, config.mamba_num_heads // config.n_groups, -1)
    return graph.reshape(dt, *split), graph.reshape(running, *split)
