"""A layer of experts recorded alone, with its weights in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twotower.config import ModelConfig
from twotower.export.graph_files import point_to_data
from twotower.export.graphs.layers import moe
from twotower.export.graphs.recorder import GraphBuilder, Layer
from twotower.spec import CONTEXT, TensorSpec, TowerSignature
from twotower.weights.declared import declared_weights, lay_out
from twotower.weights.refs import WeightRef

__all__ = ["PREFIX", "moe_graph", "recorded_moe"]

PREFIX = "context_tower.layers.1.mixer."
"""Of the first layer of experts."""


def moe_graph(config: ModelConfig, dtype: str = "float32") -> GraphBuilder:
    """From `x` to `y`, both [B,L,D]."""
    axes = ("B", "L", config.hidden_size)
    x, y = TensorSpec("x", dtype, axes), TensorSpec("y", dtype, axes)
    declared = declared_weights(config, CONTEXT, dtype)
    graph = GraphBuilder(TowerSignature("moe", (x,), (y,)), dtype, declared)
    with graph.scope("layers.0.moe"):
        given = graph.op("Identity", graph.input("x"))
        graph.output("y", moe(Layer(graph, config, PREFIX), given))
    return graph


def recorded_moe(
    folder: Path, config: ModelConfig, value_of: Callable[[str, WeightRef], np.ndarray[Any, Any]]
) -> tuple[ir.Model, dict[str, WeightRef]]:
    """The float32 graph and its weights in the folder's file `data`."""
    graph = moe_graph(config)
    recorded, refs = graph.finish(), lay_out(graph.weights)
    data = np.zeros(max(ref.end for ref in refs.values()), np.uint8)
    for name, ref in refs.items():
        value = np.broadcast_to(value_of(name, ref), ref.shape).astype(np.float32)
        data[ref.offset : ref.end] = value.view(np.uint8).reshape(-1)
    (folder / "data").write_bytes(data.tobytes())
    point_to_data(recorded, refs, "data")
    return recorded, refs
