"""Recorded graphs as files: their weights lie outside, in a data file beside them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from twotower.bundle import DATA_SUFFIX, TABLE_SUFFIX, write_weight_table
from twotower.export.graphs.tower_graphs import TowerGraph
from twotower.weights.refs import WeightRef


def point_to_data(
    model: ir.Model,
    refs: dict[str, WeightRef],
    location: str,
) -> None:
    """Gives every weight its place in a data file that is named relative to the graph's."""
    for name, ref in refs.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.ExternalTensor(
            location,
            ref.offset,
            ref.nbytes,
            value.const_value.dtype,
            shape=ir.Shape(ref.shape),
            name=name,
        )


def save_program(
    path: Path,
    graph: TowerGraph,
    refs: dict[str, WeightRef],
) -> None:
    """Writes a graph and the table of its weights, whose data file lies or will lie beside it."""
    point_to_data(graph.model, refs, path.name + DATA_SUFFIX)
    proto = ir.to_proto(graph.model)
    # Initializers say themselves what they are.
    left = [
        value
        for value in proto.graph.value_info
        if value.name not in graph.model.graph.initializers
    ]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(left)
    path.write_bytes(proto.SerializeToString())
    write_weight_table(path.with_name(path.name + TABLE_SUFFIX), refs)
