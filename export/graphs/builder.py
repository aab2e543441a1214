"""A thin recorder over onnx-ir: operators by name, constants shared, weights declared but never loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from twotower.spec import TensorSpec, TowerSignature

__all__ = ["OPSET", "GraphBuilder", "Weight", "ir_dtype"]

OPSET = 24  # the newest opset every reader of these graphs (ONNX Runtime, TensorRT 11, TensorRT-RTX 1.7) accepts
IR_VERSION = 12

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}


def ir_dtype(name: str) -> ir.DataType:
    """The onnx-ir element type of a dtype's plain name."""
    return _DTYPES[name]


@dataclass(frozen=True, slots=True)
class Weight:
    """One initializer of a graph and the checkpoint tensors it is made of.

    The data are the sources' elements one after another (stacking experts along a new first axis is exactly that),
    converted to `dtype`, so a weight can be streamed without ever being whole in memory.

    Attributes:
        name: The initializer's name; for a single source the checkpoint's own name.
        shape: Its shape.
        dtype: `float32`, `float16` or `bfloat16`.
        sources: Checkpoint tensors in order.
        negated_exp: Store -exp(x) of a (small) source: the Mamba decay rate A of A_log.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    negated_exp: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


class GraphBuilder:
    """Records one graph.

    Args:
        signature: Names, dtypes and axes of the graph's inputs and outputs.
        dtype: Element type of weights and of the residual stream.
    """

    def __init__(self, signature: TowerSignature, dtype: str) -> None:
        self.signature = signature
        self.dtype = dtype
        self.weights: list[Weight] = []
        self._tape = tape.Tape()
        self._inputs = {s.name: _value(s) for s in signature.inputs}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}
        self._outputs: dict[str, ir.Value] = {}
        self._scope = ""
        self._counts: dict[str, int] = {}

    def input(self, name: str) -> ir.Value:
        return self._inputs[name]

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Appends one node with one output. Node and output names carry the current scope, for profilers and viewers."""
        name = self._name(op_type)
        out = self._tape.op(op_type, inputs, attributes, name=name)
        out.name = f"{name}:0"
        return out

    def ops(self, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Value]:
        """Appends one node with several outputs."""
        name = self._name(op_type)
        values = self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, name=name)
        for i, value in enumerate(values):
            value.name = f"{name}:{i}"
        return values

    def constant(self, data: Any, dtype: str = "int64") -> ir.Value:
        """A small constant; equal constants are stored once."""
        array = np.asarray(data, dtype=np.dtype(dtype))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def scalar(self, value: float) -> ir.Value:
        """A scalar of the model's dtype."""
        if self.dtype == "float32":
            return self.constant(value, "float32")
        return self.shared(f"scalar {value!r}", lambda: self.op("Cast", self.constant(value, "float32"), to=ir_dtype(self.dtype)))

    def shared(self, key: str, make: Any) -> ir.Value:
        """The value `make()` recorded the first time this key was asked for: masks and ranges serve every layer."""
        if key not in self._shared:
            with self.scope("shared"):
                self._shared[key] = make()
        return self._shared[key]

    def weight(self, weight: Weight) -> ir.Value:
        """Declares an initializer whose data will be streamed in later."""
        self.weights.append(weight)
        placeholder = ir.ExternalTensor("", None, None, ir_dtype(weight.dtype), shape=ir.Shape(weight.shape), name=weight.name)
        return self._initializer(weight.name, placeholder)

    def to_float32(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == "float32" else self.op("Cast", x, to=ir.DataType.FLOAT)

    def to_model_dtype(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == "float32" else self.op("Cast", x, to=ir_dtype(self.dtype))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Reshape where 0 keeps an input dimension and -1 takes what is left."""
        return self.op("Reshape", x, self.constant(list(shape)))

    def linear(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """X W^T with W as the checkpoint stores it, [out, in]; readers fold the transpose into the product."""
        return self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))

    def silu(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def output(self, name: str, value: ir.Value) -> None:
        """Names a value as a graph output."""
        spec = self.signature.tensor(name)
        if value.is_graph_input() or value.name in self._outputs:
            value = self.op("Identity", value)
        value.name = name
        value.type = ir.TensorType(ir_dtype(spec.dtype))
        value.shape = ir.Shape(spec.axes)
        self._outputs[name] = value

    def finish(self) -> ir.Model:
        """The recorded model; every output of the signature must have been named."""
        graph = ir.Graph(
            list(self._inputs.values()),
            [self._outputs[s.name] for s in self.signature.outputs],
            nodes=self._tape.nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=self.signature.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="twotower")

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of the nodes recorded inside."""
        before, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = before

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        self._initializers[name] = value
        return value

    def _name(self, op_type: str) -> str:
        stem = f"{self._scope}{op_type}"
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        return f"{stem}_{count}" if count else stem


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(name=spec.name, type=ir.TensorType(ir_dtype(spec.dtype)), shape=ir.Shape(spec.axes))
