"""ONNX nodes: written one after another, looked up by their values, and replaced in a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import get_attribute_value, make_graph, make_node, make_tensor_value_info

PRODUCTS = ("MatMul", "FusedMatMul")
"""Operators of products in a graph that ONNX Runtime has optimised."""


def makers_of(nodes: Iterable[onnx.NodeProto]) -> dict[str, onnx.NodeProto]:
    """By value, the node that makes it."""
    return {name: node for node in nodes for name in node.output}


def readers_of(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """By value, the nodes that read it."""
    out: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            out.setdefault(name, []).append(node)
    return out


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Gives a graph other nodes."""
    new = list(nodes)
    del graph.node[:]
    graph.node.extend(new)


def with_branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The branches of a graph and theirs, then the graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from with_branches(attribute.g)
    yield graph


class NodeWriter:
    """Collects nodes in order, under names that begin with one scope."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.nodes: list[onnx.NodeProto] = []
        self._count = 0

    def op(self, kind: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        """A node of one output; its output's name."""
        (output,) = self.several(kind, 1, *inputs, named=named, **attributes)
        return output

    def several(
        self, kind: str, count: int, *inputs: str, named: str = "", **attributes: Any
    ) -> list[str]:
        """A node of several outputs; their names."""
        self._count += 1
        name = f"{self.scope}/{kind}_{self._count}"
        outputs = [named] if named else [f"{name}:{i}" for i in range(count)]
        self.nodes.append(make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def split(self, value: str, count: int) -> list[str]:
        """Each of `count` places of the first axis."""
        return self.several("Split", count, value, axis=0, num_outputs=count)

    def constant(self, value: np.ndarray[Any, Any]) -> str:
        """A constant of its own; its name."""
        return self.op("Constant", value=numpy_helper.from_array(value))

    def ints(self, value: int | list[int]) -> str:
        """A constant, int64."""
        return self.constant(np.array(value, np.int64))

    def copied(self, original: onnx.NodeProto, names: Mapping[str, str]) -> str:
        """A node on other inputs; its output's name."""
        self._count += 1
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.name = f"{self.scope}/{node.op_type}_{self._count}"
        node.input[:] = [names.get(name, name) for name in node.input]
        output = f"{node.name}:0"
        node.output[:] = [output]
        self.nodes.append(node)
        return output

    def graph(self) -> onnx.GraphProto:
        """The nodes as a branch that gives what the last of them does, float32."""
        output = make_tensor_value_info(
            self.nodes[-1].output[0],
            TensorProto.FLOAT,
            None,
        )
        return make_graph(self.nodes, self.scope, [], [output])
