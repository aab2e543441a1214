"""An ONNX graph as rules ask it: types, shapes, constants and readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

UNKNOWN = "unknown"
"""The type of a value about which nothing is known."""


def _type_name(code: int) -> str:
    """`float32`, `bfloat16`, ... of an ONNX element type."""
    names: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}
    return names.get(code) or str(TensorProto.DataType.Name(code)).lower()


class GraphView:
    """A model's top-level graph; it is not changed, and external weights need not be there.

    `fixed`: it is about to be built; all axes but those of the profiles are constants, and nobody
    else reads it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        fixed: bool = False,
    ) -> None:
        self.model = model
        self.fixed = fixed
        graph = model.graph
        # Held, so that a node is one object.
        self.nodes: Sequence[onnx.NodeProto] = list(graph.node)
        self.initializers = {t.name: t for t in graph.initializer}
        self.inputs = {i.name for i in graph.input} - set(self.initializers)
        self.outputs = {o.name for o in graph.output}
        self.declared = {v.name: _type_name(v.type.tensor_type.elem_type) for v in graph.output}
        self._inferred = self._infer()

    def _infer(self) -> dict[str, onnx.TypeProto.Tensor]:
        """What ONNX infers of every value; what the model declares of outputs is not believed."""
        bare = onnx.ModelProto()
        bare.CopyFrom(self.model)
        for output in bare.graph.output:
            output.ClearField("type")
        # An operator without a definition raises: what is unknown is a finding.
        with suppress(onnx.shape_inference.InferenceError, ValueError):
            bare = onnx.shape_inference.infer_shapes(bare)
        values = (*bare.graph.input, *bare.graph.value_info, *bare.graph.output)
        return {v.name: v.type.tensor_type for v in values if v.type.tensor_type.elem_type}

    def dtype(self, name: str) -> str:
        """The element type of a value."""
        if name in self.initializers:
            return _type_name(self.initializers[name].data_type)
        if name in self._inferred:
            return _type_name(self._inferred[name].elem_type)
        return UNKNOWN

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a value's axes, 0 for what is not a number; empty if nothing is known."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        if name in self._inferred:
            return tuple(d.dim_value for d in self._inferred[name].shape.dim)
        return ()

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of a constant that lies in the graph itself."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    @cached_property
    def data_dependent(self) -> frozenset[str]:
        """Values that depend on an input or an external weight, and not on shapes alone."""
        out = set(self.inputs)
        for name, tensor in self.initializers.items():
            if tensor.data_location == TensorProto.EXTERNAL:
                out.add(name)
        for node in self.nodes:
            if node.op_type != "Shape" and any(name in out for name in node.input):
                out.update(name for name in node.output if name)
        return frozenset(out)

    @cached_property
    def readers(self) -> Mapping[str, tuple[onnx.NodeProto, ...]]:
        """The operators that read a value, once for each operand it is."""
        out: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                out.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in out.items()}

    @staticmethod
    def attribute(
        node: onnx.NodeProto,
        name: str,
        default: int = 0,
    ) -> int:
        """A whole number among an operator's attributes."""
        for a in node.attribute:
            if a.name == name:
                return int(a.i)
        return default

    @staticmethod
    def operand(node: onnx.NodeProto, index: int) -> str:
        """The name of an operand; empty where it is left out."""
        if index < len(node.input):
            return str(node.input[index])
        return ""
