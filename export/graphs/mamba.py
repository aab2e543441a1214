"""The Mamba-2 mixer as matrix products over a chunk, seeded with its states, scanned in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from twotower.export.graphs.recorder import ChunkInfo, Layer
from twotower.spec import past_conv, past_ssm, present_conv, present_ssm


def mamba(
    layer: Layer,
    u: ir.Value,
    chunk: ChunkInfo,
) -> ir.Value:
    """Mamba-2 [B,L,D] on u [B,L,D], from the convolution's and the SSM's state.

    With `chunk.lengths` the states after the last valid token are outputs of the graph.
    """
    return _Mixer(layer, chunk).record(u)


@dataclass(frozen=True, slots=True)
class _Steps:
    """What a scan reads: x [B,G,H/G,L,P], b [B*G,L,N], dt and the running dt*A [B,G,H/G,L]."""

    x: ir.Value
    b: ir.Value
    dt: ir.Value
    decay: ir.Value


class _Mixer:
    def __init__(
        self,
        layer: Layer,
        chunk: ChunkInfo,
    ) -> None:
        self._layer, self._chunk = layer, chunk
        self._graph, self._config = layer.graph, layer.config

    def record(self, u: ir.Value) -> ir.Value:
        graph, layer = self._graph, self._layer
        z, rows, dt = self._projected(u)
        before = graph.input(past_conv(layer.number))
        rows = graph.op("Concat", before, rows, axis=1)  # [B,K-1+L,C]
        if self._chunk.lengths is not None:
            self._output_conv_state(rows, self._chunk.lengths)
        mixed = self._convolved(rows)
        y = self._scan(mixed, dt)

        # RMSNorm of y * silu(z) within each group of HP/G channels, in float32, the gate first.
        inner, groups = self._config.mamba_inner, self._config.n_groups
        gate = graph.silu(graph.to_float32(z))
        gated = graph.op("Mul", y, gate)
        ones = graph.constant([1.0] * (inner // groups), "float32")
        gated = graph.reshape(gated, 0, 0, groups, inner // groups)
        epsilon = self._config.layer_norm_epsilon
        normed = graph.op("RMSNormalization", gated, ones, axis=-1, epsilon=epsilon)
        normed = graph.reshape(normed, 0, 0, inner)
        scaled = graph.op("Mul", normed, layer.weight("norm.weight"))
        scaled = graph.to_model_dtype(scaled)
        return graph.linear(scaled, layer.weight("out_proj.weight"))

    def _projected(self, u: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The gate z, the rows [B,L,C] of the convolution, and the raw dt of u [B,L,D].

        One product, unless it is quantized: the few rows that make dt then stay float, because dt
        goes through two exponentials.
        """
        graph, layer = self._graph, self._layer
        inner, channels = self._config.mamba_inner, self._config.conv_channels
        if layer.has("in_proj.weight.dt"):
            dt = graph.linear_exact(u, layer.weight("in_proj.weight.dt"))
            projected = graph.linear(u, layer.weight("in_proj.weight"))
            parts = graph.constant([inner, channels])
            z, rows = graph.ops("Split", 2, projected, parts, axis=-1)
        else:
            projected = graph.linear(u, layer.weight("in_proj.weight"))
            parts = graph.constant([inner, channels, self._config.mamba_num_heads])
            z, rows, dt = graph.ops("Split", 3, projected, parts, axis=-1)
        return z, rows, dt

    def _convolved(self, rows: ir.Value) -> ir.Value:
        """Depthwise causal convolution and SiLU of [B,K-1+L,C]: float32 [B,L,C].

        A product for each tap fuses with the transposes and the SiLU around it; Conv does not.
        """
        graph, width = self._graph, self._config.conv_kernel
        kernel = self._layer.weight("conv1d.weight.transposed")
        taps = graph.ops("Split", width, kernel, axis=0, num_outputs=width)
        terms = []
        for j, tap in enumerate(taps):
            start = graph.constant([j])
            end = graph.constant([j + 1 - width or 2**62])
            part = graph.op("Slice", rows, start, end, graph.constant([1]))  # [B,L,C]
            terms.append(graph.op("Mul", part, tap))
        if self._config.use_conv_bias:
            terms.append(self._layer.weight("conv1d.bias"))
        mixed = graph.op("Sum", *terms)
        return graph.to_float32(graph.silu(mixed))

    def _output_conv_state(
        self,
        rows: ir.Value,
        lengths: ir.Value,
    ) -> None:
        """The last K-1 raw rows before each text's end: [n, n+K-1) of [B,K-1+L,C], n tokens."""
        graph, count = self._graph, self._config.conv_kernel - 1

        def places() -> ir.Value:
            offsets = graph.constant([[[i] for i in range(count)]])
            ends = graph.unsqueeze(lengths, 1, 2)
            return graph.op("Add", ends, offsets)

        kept = graph.op(
            "GatherND",
            rows,
            graph.shared("conv state", places),
            batch_dims=1,
        )
        graph.output(present_conv(self._layer.number), kept)

    def _scan(
        self,
        mixed: ir.Value,
        raw_dt: ir.Value,
    ) -> ir.Value:
        """The state-space recurrence over a whole chunk: y [B,L,HP], all in float32.

        `mixed` is x, B and C side by side and convolved, [B,L,HP+2GN] float32; `raw_dt` is [B,L,H].
        """
        graph, config, length = self._graph, self._config, self._chunk.length
        g, n, p = config.n_groups, config.ssm_state_size, config.mamba_head_dim
        h = config.mamba_num_heads // g
        graph.constant([-1])  # its place among the constants is part of a graph's identity
        sizes = graph.constant([g * h * p, 2 * g * n])
        x, bc = graph.ops("Split", 2, mixed, sizes, axis=-1)
        x = graph.reshape(x, 0, 0, g, h, p)
        x = graph.op("Transpose", x, perm=[0, 2, 3, 1, 4])
        # The heads of a group share B and C. Rows and groups are one axis, [B*G,L,N]: TensorRT
        # reads a transposed operand where it lies in a product with one such axis, and copies it in
        # one with two. One of those operands is the state.
        bc = graph.reshape(bc, 0, 0, 2 * g, n)
        bc = graph.op("Transpose", bc, perm=[0, 2, 1, 3])
        b, c = graph.ops("Split", 2, bc, axis=1, num_outputs=2)
        b = graph.reshape(b, -1, length, n)
        c = graph.reshape(c, -1, length, n)
        dt, decay = self._time_steps(raw_dt)
        steps = _Steps(x, b, dt, decay)
        y, decay_t = self._within(steps, c)
        # From before the chunk: the old state, decayed to t.
        state = graph.input(past_ssm(self._layer.number))
        state = graph.reshape(state, -1, h * p, n)
        state = graph.op("Transpose", state, perm=[0, 2, 1])
        carried = graph.op("MatMul", c, state)
        carried = graph.reshape(carried, -1, g, length, h, p)
        carried = graph.op(
            "Transpose",
            carried,
            perm=[0, 1, 3, 2, 4],
        )
        carried = graph.op("Mul", carried, graph.op("Exp", decay_t))
        y = graph.op("Add", y, carried)
        y = graph.op(
            "Add",
            y,
            graph.op("Mul", x, self._layer.weight("D")),
        )
        y = graph.op("Transpose", y, perm=[0, 3, 1, 2, 4])
        y = graph.reshape(y, 0, 0, config.mamba_inner)
        if self._chunk.lengths is not None:
            self._output_state(steps)
        return y

    def _within(
        self,
        steps: _Steps,
        c: ir.Value,
    ) -> tuple[ir.Value, ir.Value]:
        """What the chunk's own tokens add, [B,G,H/G,L,P], and the decay to each of them, [...,L,1].

        Position t sees s <= t through exp(decay_t - decay_s). Masked before exp, which would
        overflow above the diagonal. Adding -inf masks as well as selecting does, because the
        exponent is finite, and ONNX Runtime adds nearly 20 times as fast.
        """
        graph, length = self._graph, self._chunk.length
        last = graph.constant([-1])
        x_dt = graph.op(
            "Mul",
            steps.x,
            graph.op("Unsqueeze", steps.dt, last),
        )
        decay_t = graph.op("Unsqueeze", steps.decay, last)
        decay_s = graph.unsqueeze(steps.decay, -2)
        exponent = graph.op("Sub", decay_t, decay_s)
        exponent = graph.op("Add", exponent, self._chunk.future)
        within = graph.op("Exp", exponent)
        transposed = graph.op("Transpose", steps.b, perm=[0, 2, 1])
        similarity = graph.op("MatMul", c, transposed)  # [B*G,L,L]
        similarity = graph.reshape(similarity, -1, self._config.n_groups, 1, length, length)
        weighed = graph.op("Mul", similarity, within)
        return graph.op("MatMul", weighed, x_dt), decay_t

    def _output_state(self, steps: _Steps) -> None:
        """The state [B,H,P,N] after the chunk: the old one decayed over it, and what it adds."""
        graph, config = self._graph, self._config
        g, n, p = config.n_groups, config.ssm_state_size, config.mamba_head_dim
        h = config.mamba_num_heads // g
        last = graph.constant([-1])
        end, axis = graph.constant([2**62]), graph.constant([3])
        total = graph.op("Slice", steps.decay, last, end, axis)
        to_end = graph.op("Exp", graph.op("Sub", total, steps.decay))
        to_end = graph.op("Mul", steps.dt, to_end)
        gained = graph.op(
            "Mul",
            steps.x,
            graph.op("Unsqueeze", to_end, last),
        )
        gained = graph.op("Transpose", gained, perm=[0, 1, 3, 2, 4])
        gained = graph.reshape(gained, -1, self._chunk.length, h * p)
        gained = graph.op("Transpose", gained, perm=[0, 2, 1])
        gained = graph.op("MatMul", gained, steps.b)  # [B*G,HP/G,N]
        factor = graph.op("Exp", total)
        factor = graph.reshape(factor, 0, -1, 1, 1)
        kept = graph.op(
            "Mul",
            graph.input(past_ssm(self._layer.number)),
            factor,
        )
        gained = graph.reshape(gained, -1, g * h, p, n)
        after = graph.op("Add", kept, gained)
        graph.output(present_ssm(self._layer.number), after)

    def _time_steps(self, raw: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Step sizes dt, 0 for padding, and the running sum of dt*A, both [B,G,H/G,L] float32."""
        graph, config, chunk = self._graph, self._config, self._chunk
        dt = graph.op("Transpose", raw, perm=[0, 2, 1])
        dt = graph.to_float32(dt)  # [B,H,L]
        dt = graph.op("Add", dt, self._layer.weight("dt_bias"))
        dt = graph.op("Softplus", dt)
        low, high = config.time_step_limit
        if low > 0 or high < math.inf:
            least = graph.constant(low, "float32")
            most = graph.constant(min(high, 3.0e38), "float32")
            dt = graph.op("Clip", dt, least, most)
        if chunk.valid is not None:
            dt = graph.op("Mul", dt, chunk.valid)
        step = graph.op(
            "Mul",
            dt,
            self._layer.weight("A_log.negated_exp"),
        )
        # Running sums without CumSum, which TensorRT miscompiles. Over a block they are sums of
        # what is masked, which fuse with what is around them. Over a chunk of any length that would
        # be L x L numbers a head, and a product is faster.
        if chunk.lengths is not None:
            lower = graph.op("Transpose", chunk.until, perm=[1, 0])
            running = graph.op("MatMul", step, lower)
        else:
            masked = graph.unsqueeze(step, -2)
            masked = graph.op("Mul", masked, chunk.until)
            running = graph.sum(masked, -1)
        split = (0, config.n_groups, config.mamba_num_heads // config.n_groups, -1)
        return graph.reshape(dt, *split), graph.reshape(running, *split)
