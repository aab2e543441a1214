"""An ONNX graph as rules want to ask it: types, shapes, constants, producers, and what depends on the values of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

__all__ = ["GraphView", "type_name"]

_SHAPE_OF = frozenset({"Shape", "Size"})  # what leaves these depends on shapes only, never on values


def type_name(code: int) -> str:
    """`float32`, `bfloat16`, ... of an ONNX element type; `unknown` of none."""
    names = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
    return "unknown" if code == TensorProto.UNDEFINED else names.get(code, TensorProto.DataType.Name(code).lower())


class GraphView:
    """A model's top-level graph. External weights need not be there.

    Args:
        model: The model; it is not changed.
        fixed: Whether all axes but those of the profiles are constants, as in a graph about to be built.
    """

    def __init__(self, model: onnx.ModelProto, *, fixed: bool = False) -> None:
        self.model = model
        self.fixed = fixed
        graph = model.graph
        self.nodes: Sequence[onnx.NodeProto] = graph.node
        self.initializers = {t.name: t for t in graph.initializer}
        self.inputs = {i.name for i in graph.input} - set(self.initializers)
        self.outputs = {o.name for o in graph.output}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self._values = {v.name: v.type.tensor_type for v in (*self._inferred.graph.value_info, *graph.input, *graph.output)}

    @cached_property
    def _inferred(self) -> onnx.ModelProto:
        try:
            return onnx.shape_inference.infer_shapes(self.model)
        except (onnx.shape_inference.InferenceError, ValueError):  # operators of another domain, or a model above 2 GB
            return self.model

    def dtype(self, name: str) -> str:
        """The element type of a value."""
        if name in self.initializers:
            return type_name(self.initializers[name].data_type)
        return type_name(self._values[name].elem_type) if name in self._values else "unknown"

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """Whole numbers, letters of dynamic axes, None for an unknown axis; None where even the rank is unknown."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        if name not in self._values or not self._values[name].HasField("shape"):
            return None
        return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in self._values[name].shape.dim)

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of a constant that lies in the graph itself."""
        tensor = self.initializers.get(name)
        node = self.producers.get(name)
        if tensor is None and node is not None and node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    @cached_property
    def data_dependent(self) -> frozenset[str]:
        """Values that depend on what is in an input or a weight, not only on shapes and constants."""
        out = set(self.inputs) | {name for name, t in self.initializers.items() if t.data_location == TensorProto.EXTERNAL}
        for node in self.nodes:
            if node.op_type not in _SHAPE_OF and any(name in out for name in node.input):
                out.update(name for name in node.output if name)
        return frozenset(out)

    @cached_property
    def read(self) -> frozenset[str]:
        """Values some operator reads."""
        return frozenset(name for node in self.nodes for name in node.input if name)

    @staticmethod
    def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
        """An attribute's value; text as text."""
        for a in node.attribute:
            if a.name == name:
                value = onnx.helper.get_attribute_value(a)
                return value.decode() if isinstance(value, bytes) else value
        return default

    @staticmethod
    def operand(node: onnx.NodeProto, index: int) -> str:
        """The name of an operand; empty where it is left out."""
        return node.input[index] if index < len(node.input) else ""

    @staticmethod
    def result(node: onnx.NodeProto, index: int) -> str:
        """The name of a result; empty where it is left out."""
        return node.output[index] if index < len(node.output) else ""
