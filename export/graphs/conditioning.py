"""How far a block is denoised, as shift, scale and gate of every denoiser layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twotower.checkpoint.layout import TIMESTEP_FREQUENCIES
from twotower.config import LayerKind, ModelConfig
from twotower.export.graphs.builder import GraphBuilder
from twotower.export.graphs.layers import LayerWeights, rms_norm

__all__ = ["Modulation", "conditioning", "modulation", "normed_input"]


@dataclass(frozen=True, slots=True)
class Modulation:
    """One layer's adaptive normalisation, [B,1,D] each; `scale` already holds 1 + scale."""

    shift: ir.Value
    scale: ir.Value
    gate: ir.Value


def conditioning(graph: GraphBuilder, masked_fraction: ir.Value, config: ModelConfig) -> ir.Value:
    """The conditioning [B,3,D] all layers share, from t [B] float32 in [0,1]."""
    d, weights = config.hidden_size, LayerWeights(graph, "")
    # The published model rounds t to its own dtype before the factor 1000, and multiplies in this order: angles reach
    # 1000, where another order of rounding moves the embedding by more than the rest of the float32 arithmetic does.
    t = graph.to_float32(graph.to_model_dtype(masked_fraction))
    scaled = graph.op("Mul", graph.op("Unsqueeze", t, graph.constant([1])), graph.constant(1000.0, "float32"))
    exponents = np.arange(TIMESTEP_FREQUENCIES, dtype=np.float32) * np.float32(-math.log(10000.0)) / np.float32(TIMESTEP_FREQUENCIES)
    rates = np.exp(exponents.astype(np.float64))  # correctly rounded below; numpy's float32 exp is off by an ulp in half the places
    angles = graph.op("Mul", scaled, graph.constant(rates[None], "float32"))
    waves = graph.op("Concat", graph.op("Cos", angles), graph.op("Sin", angles), axis=-1)
    e = _affine(graph, graph.to_model_dtype(waves), weights, ("t_embedder.mlp.0", d, 2 * TIMESTEP_FREQUENCIES))
    e = _affine(graph, graph.silu(e), weights, ("t_embedder.mlp.2", d, d))
    m = _affine(graph, graph.silu(e), weights, ("t_block.1", 3 * d, d))
    return graph.reshape(m, 0, 3, d)


def modulation(graph: GraphBuilder, shared: ir.Value, config: ModelConfig, layer: int) -> Modulation:
    """Shift, scale and gate of one layer: its table plus the shared conditioning."""
    table = LayerWeights(graph, "")(f"scale_shift_tables.{layer}", 3, config.hidden_size)
    shift, scale, gate = graph.ops("Split", 3, graph.op("Add", shared, table), axis=1, num_outputs=3)
    return Modulation(shift, graph.op("Add", scale, graph.scalar(1.0)), gate)


def normed_input(graph: GraphBuilder, h: ir.Value, norm: ir.Value, kind: LayerKind, *, by: Modulation, epsilon: float) -> ir.Value:
    """What a denoiser layer's mixer reads: Mamba and attention modulate and then norm, MoE and MLP the other way round."""
    if kind in (LayerKind.MAMBA, LayerKind.ATTENTION):
        return rms_norm(graph, _modulated(graph, h, by), norm, epsilon)
    return _modulated(graph, rms_norm(graph, h, norm, epsilon), by)


def _modulated(graph: GraphBuilder, x: ir.Value, by: Modulation) -> ir.Value:
    return graph.op("Add", graph.op("Mul", x, by.scale), by.shift)


def _affine(graph: GraphBuilder, x: ir.Value, weights: LayerWeights, layer: tuple[str, int, int]) -> ir.Value:
    name, out, into = layer
    weight, bias = weights(f"{name}.weight", out, into), weights(f"{name}.bias", 1, out)
    return graph.op("Gemm", x, weight, bias, transB=1)
