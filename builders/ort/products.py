"""Products of ONNX Runtime on a CPU that compute a row alike, alone or beside others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.helper import make_attribute, make_node

__all__ = ["compute_rows_alike", "experts_are_packed", "with_branches"]

_SHARE_OF_MEMORY = 2

_PRODUCTS = ("MatMul", "FusedMatMul")


def experts_are_packed(weight_bytes: int, memory: int) -> bool:
    """Whether experts are packed for the product when an engine is opened: twice as fast, and a copy in anonymous memory.

    They are where all weights take half of the memory or less; else they are read where they lie,
    in the mapped file. All other matrices always are packed. A packed product is cut into sums of
    its own in one way only; one that is not packed in a way that depends on the columns each thread
    computes, where these are fewer than 128: a router has so few, an expert has not.

    Args:
        weight_bytes: Of the three engines of a bundle, float32.
        memory: Bytes this process may use, 0 where nobody knows.
    """
    return _SHARE_OF_MEMORY * weight_bytes <= memory


def compute_rows_alike(model: onnx.ModelProto, weights: Sequence[str]) -> None:
    """Keeps products off the kernel for one row alone, in place, branches included.

    Of a weight that is not packed, ONNX Runtime multiplies one row with a kernel of its own, which
    adds up in another order: the row would differ from the same row in a batch. It takes that
    kernel only for a product that is not scaled. So the product is halved and its result doubled,
    which is exact. A single row takes up to 1.5 times as long as with that kernel.

    Args:
        model: An optimised graph, its weights outside.
        weights: Names of the weights that are not packed: stacks, and what is quantized.
    """
    names = set(weights)
    two = numpy_helper.from_array(np.array(2, np.float32), "rows_alike.two")
    changed = [_doubled(graph, names, two.name) for graph in with_branches(model.graph)]
    if any(changed):
        model.graph.initializer.append(two)


def _doubled(graph: onnx.GraphProto, weights: set[str], two: str) -> bool:
    nodes: list[onnx.NodeProto] = []
    readers = {
        n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights
    }
    for node in graph.node:
        nodes.append(node)
        if node.op_type not in _PRODUCTS or node.input[1] not in weights | readers:
            continue
        kept = [a for a in node.attribute if a.name != "alpha"]
        del node.attribute[:]
        node.attribute.extend([*kept, make_attribute("alpha", 0.5)])
        node.op_type, node.domain = "FusedMatMul", "com.microsoft"
        output, half = node.output[0], f"{node.output[0]}/half"
        node.output[0] = half
        nodes.append(make_node("Mul", [half, two], [output], name=f"{node.name}/double"))
    changed = len(nodes) > len(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def with_branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The branches of a graph and theirs, then the graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from with_branches(attribute.g)
    yield graph
