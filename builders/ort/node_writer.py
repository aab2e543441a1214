"""ONNX nodes written one after another by a builder that changes a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_graph, make_node, make_tensor_value_info

__all__ = ["NodeWriter"]


class NodeWriter:
    """Nodes in their order, under names of one scope.

    Args:
        scope: What all names begin with.

    Attributes:
        nodes: What was written so far.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.nodes: list[onnx.NodeProto] = []
        self._count = 0

    def op(self, kind: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        """A node of one output; its output's name."""
        (output,) = self.several(kind, 1, *inputs, named=named, **attributes)
        return output

    def several(
        self,
        kind: str,
        count: int,
        *inputs: str,
        named: str = "",
        **attributes: Any,
    ) -> list[str]:
        """A node of several outputs; their names."""
        self._count += 1
        name = f"{self.scope}/{kind}_{self._count}"
        outputs = [named] if named else [f"{name}:{i}" for i in range(count)]
        self.nodes.append(make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def split(self, value: str, count: int, *, axis: int = 0) -> list[str]:
        """Each of `count` places of an axis."""
        return self.several("Split", count, value, axis=axis, num_outputs=count)

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
        output = make_tensor_value_info(self.nodes[-1].output[0], TensorProto.FLOAT, None)
        return make_graph(self.nodes, self.scope, [], [output])
