"""Matrix products in float32 written as sums, for compute capabilities whose compiler has no such product."""

from __future__ import annotations

from typing import Any

import onnx

from twotower.graph_lint.view import GraphView

__all__ = ["sum_float32_products"]


def sum_float32_products(model: onnx.ModelProto) -> int:
    """Writes every MatMul of float32 values as a multiplication and a sum, in place.

    A float16 tower has some: Mamba's scan and the router compute in float32, whatever the dtype. The
    compiler of TensorRT for RTX fuses the multiplication into the sum, so that the products of
    single elements do not lie in memory (tests/builders/test_rtx.py holds the scratch of a prefill).

    Returns:
        How many there were.
    """
    view = GraphView(model)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and view.dtype(node.output[0]) == "float32":
            nodes += _summed(node)
            count += 1
        else:
            nodes.append(node)
    if count:
        model.graph.initializer.extend(_axis(axis) for axis in (-1, -2, -3))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return count


def _summed(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """[..,M,K] x [..,K,N] as the sum over K of [..,M,K,1] * [..,1,K,N]."""
    left, right, product = (f"{node.output[0]}/{part}" for part in ("left", "right", "product"))

    def made(operator: str, inputs: list[str], output: str, part: str, **attributes: Any) -> onnx.NodeProto:
        return onnx.helper.make_node(operator, inputs, [output], name=f"{node.name}_{part}", **attributes)

    return [
        made("Unsqueeze", [node.input[0], _axis(-1).name], left, "left"),
        made("Unsqueeze", [node.input[1], _axis(-3).name], right, "right"),
        made("Mul", [left, right], product, "product"),
        made("ReduceSum", [product, _axis(-2).name], node.output[0], "sum", keepdims=0),
    ]


def _axis(axis: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor(f"float32_sums.axis{axis}", onnx.TensorProto.INT64, [1], [axis])
