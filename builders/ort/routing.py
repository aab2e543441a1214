"""A router's choice as ONNX Runtime computes it best: with TopK, where the exported graph compares all pairs of experts.

Comparing pairs is part of one kernel on a GPU (`export/graphs/layers.py`); on a CPU it is a value
for each pair of experts and token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from twotower.builders.ort.node_writer import NodeWriter

__all__ = ["choose_by_topk"]

Makers = Mapping[str, onnx.NodeProto]


def choose_by_topk(model: onnx.ModelProto) -> None:
    """Rewrites every choice of the first `k` of values [C,N] along their first axis, in place.

    Of equal values the one that comes first is chosen, with either. Where a value is not a number,
    comparisons chose all and TopK chooses `k`.
    """
    nodes = list(model.graph.node)
    makers = {name: node for node in nodes for name in node.output}
    constants = {t.name: t for t in model.graph.initializer if not t.external_data}
    new: dict[int, list[onnx.NodeProto]] = {}
    for node in nodes:
        values = _compared_in_pairs(node, makers)
        if values is not None and node.input[1] in constants:
            k = int(numpy_helper.to_array(constants[node.input[1]]))
            new[id(node)] = _topk(node, values, k)
    if new:
        written = [new_node for node in nodes for new_node in new.get(id(node), [node])]
        del model.graph.node[:]
        model.graph.node.extend(_used(written, {value.name for value in model.graph.output}))


def _compared_in_pairs(less: onnx.NodeProto, makers: Makers) -> str | None:
    """The values whose places in descending order a node compares with a number, if that is what it does."""
    steps = (("Less", 0), ("ReduceSum", 0), ("Where", 0))
    node: onnx.NodeProto | None = less
    for kind, place in steps:
        if node is None or node.op_type != kind:
            return None
        node = makers.get(node.input[place])
    if node is None or node.op_type != "Greater":
        return None
    values, mine = node.input
    turned = makers.get(mine)
    return (
        values
        if turned is not None and turned.op_type == "Unsqueeze" and turned.input[0] == values
        else None
    )


def _topk(less: onnx.NodeProto, values: str, k: int) -> list[onnx.NodeProto]:
    w = NodeWriter(f"{less.name}/topk")
    _, places = w.several("TopK", 2, values, w.ints([k]), axis=0)
    nobody = w.op("ConstantOfShape", w.op("Shape", values), value=_flag(False))
    everybody = w.op("ConstantOfShape", w.op("Shape", places), value=_flag(True))
    w.op("ScatterElements", nobody, places, everybody, named=less.output[0], axis=0)
    return w.nodes


def _flag(value: bool) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array([value]))


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that lead to what is wanted; none has branches yet."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
