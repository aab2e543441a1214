"""Rewrites of a graph, in place, into forms that ONNX Runtime computes well on a CPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_attribute, make_node, make_tensor_value_info

from twotower.builders.ort.nodes import (
    PRODUCTS,
    NodeWriter,
    makers_of,
    replace_nodes,
    with_branches,
)
from twotower.builders.segment import needed_nodes
from twotower.weights.external import drop_values, weight_refs


def float4_weights(model: onnx.ModelProto) -> Iterator[tuple[str, str, str, str]]:
    """Weights in 4-bit floats: values, the output that reads them, block scales, global scale."""
    code: Any = TensorProto.FLOAT4E2M1
    values = {t.name for t in model.graph.initializer if t.data_type == code}
    makers = makers_of(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    for output, node in makers.items():
        if node.input[0] in values:
            scale = makers[node.input[1]]
            yield node.input[0], output, scale.input[0], scale.input[1]


def expand_float4(model: onnx.ModelProto) -> None:
    """Takes the reading of 4-bit floats out of a graph: the weight is float32, read directly."""
    direct: dict[str, str] = {}
    scales: set[str] = set()
    for values, output, *names in float4_weights(model):
        direct[output] = values
        scales.update(names)
    for tensor in model.graph.initializer:
        if tensor.name in direct.values():
            tensor.data_type = TensorProto.FLOAT
    nodes = []
    for node in model.graph.node:
        is_reader = node.output[0] in direct
        is_scale = node.op_type == "DequantizeLinear" and node.input[0] in scales
        if not is_reader and not is_scale:
            node.input[:] = [direct.get(name, name) for name in node.input]
            nodes.append(node)
    replace_nodes(model.graph, nodes)
    drop_values(model.graph, scales)


def hide_dequantization(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Makes graph inputs of dequantized weights, so that an optimiser sees products of floats.

    ONNX Runtime's own passes would move the transpose of a weight in front of its DequantizeLinear,
    and to do so quantize the whole weight once more in every pass; and they would not fuse that
    transpose into the product.

    Returns:
        The operators that were taken out, for `show_dequantization`.
    """
    refs = weight_refs(model)
    hidden: list[onnx.NodeProto] = []
    others: list[onnx.NodeProto] = []
    for node in model.graph.node:
        is_reader = node.op_type == "DequantizeLinear" and node.input[0] in refs
        (hidden if is_reader else others).append(node)
    replace_nodes(model.graph, others)
    drop_values(model.graph, {name for node in hidden for name in node.input})
    for node in hidden:
        shape = list(refs[node.input[0]].shape)
        value = make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape)
        model.graph.input.append(value)
    return hidden


def show_dequantization(model: onnx.ModelProto, hidden: Sequence[onnx.NodeProto]) -> None:
    """Puts the operators back, each before its first reader: no weight is expanded earlier."""
    waiting = makers_of(hidden)
    drop_values(model.graph, set(waiting))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += [waiting.pop(name) for name in node.input if name in waiting]
        nodes.append(node)
    replace_nodes(model.graph, nodes)


def compute_rows_alike(model: onnx.ModelProto, weights: Collection[str]) -> None:
    """Keeps products off the kernel for one row alone, branches included.

    Of a weight that is not packed, ONNX Runtime multiplies one row with a kernel of its own, which
    adds up in another order: the row would differ from the same row in a batch. It takes that
    kernel only for a product that is not scaled. So the product is halved and its result doubled,
    which is exact. A single row takes up to 1.5 times as long as with that kernel.

    Args:
        model: An optimised graph, its weights outside.
        weights: Names of the weights that are not packed: stacks, and what is quantized.
    """
    two = numpy_helper.from_array(np.array(2, np.float32), "rows_alike.two")
    any_changed = False
    for graph in with_branches(model.graph):
        unpacked = set(weights)
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in weights:
                unpacked.add(node.output[0])
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            nodes.append(node)
            if node.op_type in PRODUCTS and node.input[1] in unpacked:
                nodes.append(_halve(node, two.name))
                any_changed = True
        replace_nodes(graph, nodes)
    if any_changed:
        model.graph.initializer.append(two)


def _halve(product: onnx.NodeProto, two: str) -> onnx.NodeProto:
    """Halves a product; the node that doubles it again, under its name."""
    others = [a for a in product.attribute if a.name != "alpha"]
    del product.attribute[:]
    product.attribute.extend([*others, make_attribute("alpha", 0.5)])
    product.op_type, product.domain = "FusedMatMul", "com.microsoft"
    output, half = product.output[0], f"{product.output[0]}/half"
    product.output[0] = half
    return make_node(
        "Mul",
        [half, two],
        [output],
        name=f"{product.name}/double",
    )


def choose_by_topk(model: onnx.ModelProto) -> None:
    """Chooses the first `k` of values [C,N] along their first axis with TopK.

    The exported graph compares all pairs of experts, which is part of one kernel on a GPU
    (`export/graphs/layers.py`); on a CPU it is a value for each pair of experts and token. Of
    equal values the one that comes first is chosen, with either. Where a value is not a number,
    comparisons chose all and TopK chooses `k`.
    """
    graph = model.graph
    makers = makers_of(graph.node)
    constants = {t.name: t for t in graph.initializer if not t.external_data}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        values = _compared_in_pairs(node, makers)
        if values is not None and node.input[1] in constants:
            k = int(numpy_helper.to_array(constants[node.input[1]]))
            nodes += _topk(node, values, k)
        else:
            nodes.append(node)
    if len(nodes) == len(graph.node):
        return
    used = needed_nodes(nodes, [value.name for value in graph.output])  # none has branches yet
    replace_nodes(graph, [nodes[i] for i in used])


def _compared_in_pairs(less: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> str | None:
    """The values whose places in descending order a node compares with a number, if it does."""
    node: onnx.NodeProto | None = less
    for kind in ("Less", "ReduceSum", "Where"):
        if node is None or node.op_type != kind:
            return None
        node = makers.get(node.input[0])
    if node is None or node.op_type != "Greater":
        return None
    values, mine = node.input
    turned = makers.get(mine)
    if turned is None or turned.op_type != "Unsqueeze" or turned.input[0] != values:
        return None
    return str(values)


def _topk(less: onnx.NodeProto, values: str, k: int) -> list[onnx.NodeProto]:
    w = NodeWriter(f"{less.name}/topk")
    no, yes = (numpy_helper.from_array(np.array([flag])) for flag in (False, True))
    _, places = w.several("TopK", 2, values, w.ints([k]), axis=0)
    nobody = w.op("ConstantOfShape", w.op("Shape", values), value=no)
    everybody = w.op(
        "ConstantOfShape",
        w.op("Shape", places),
        value=yes,
    )
    w.op("ScatterElements", nobody, places, everybody, named=less.output[0], axis=0)
    return w.nodes
