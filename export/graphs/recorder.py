"""A thin recorder over onnx-ir: operators by name, constants shared, weights declared but never loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from twotower.config.formats import WeightFormat
from twotower.dtypes import numpy_dtype, onnx_code
from twotower.export.graphs.precision import Precision, Tap
from twotower.spec import TensorSpec, TowerSignature
from twotower.weights.declared import Weight

__all__ = ["OPSET", "GraphBuilder", "ir_dtype"]

# the newest opset every reader of these graphs (ONNX Runtime, TensorRT 11, TensorRT-RTX 1.7)
# accepts
OPSET = 24
IR_VERSION = 12


def ir_dtype(name: str) -> ir.DataType:
    """The onnx-ir element type of a dtype's plain name."""
    return ir.DataType(onnx_code(name))


class GraphBuilder:
    """Records one graph.

    Args:
        signature: Names, dtypes and axes of the graph's inputs and outputs.
        dtype: Element type of weights and of the residual stream.
        precision: Which weights are quantized, and the inputs of which products; None for none.
    """

    def __init__(
        self, signature: TowerSignature, dtype: str, precision: Precision | None = None
    ) -> None:
        self.signature = signature
        self.dtype = dtype
        self.precision = precision or Precision()
        self.weights: list[Weight] = []
        self.taps: dict[str, Tap] = {}
        self._tape = tape.Tape()
        self._inputs = {s.name: _value(s) for s in signature.inputs}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}
        self._outputs: dict[str, ir.Value] = {}
        self._scope = ""
        self._values = 0
        self._counts: dict[str, int] = {}
        self._weight_names: dict[ir.Value, str] = {}
        self._rounded: dict[ir.Value, ir.Value] = {}

    def input(self, name: str) -> ir.Value:
        return self._inputs[name]

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Appends one node with one output. A node's name carries the current scope, for profilers and viewers; values are numbered."""
        name = self._name(op_type)
        out = self._tape.op(op_type, inputs, attributes, name=name)
        out.name = self._next_value()
        return out

    def ops(
        self, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Appends one node with several outputs."""
        name = self._name(op_type)
        values = self._tape.op_multi_out(
            op_type, inputs, attributes, num_outputs=outputs, name=name
        )
        for value in values:
            value.name = self._next_value()
        return values

    def mark(self, name: str, value: ir.Value) -> ir.Value:
        """Names a value within the current scope, so that builders find it; to be called before anything notes its name.

        An input of the graph keeps the name it has by contract.
        """
        if value.producer() is not None:
            value.name = f"{self._scope}{name}"
        return value

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
        return self.shared(
            f"scalar {value!r}",
            lambda: self.op("Cast", self.constant(value, "float32"), to=ir_dtype(self.dtype)),
        )

    def shared(self, key: str, make: Any) -> ir.Value:
        """The value `make()` recorded the first time this key was asked for: masks and ranges serve every layer."""
        if key not in self._shared:
            with self.scope("shared"):
                self._shared[key] = make()
        return self._shared[key]

    def weight(self, weight: Weight) -> ir.Value:
        """Declares an initializer whose data will be streamed in later, and what reads it back where it is quantized."""
        how = self.precision.weights.get(weight.origin or weight.name)
        value = (
            self._declared(weight)
            if how is None or len(weight.shape) < 2
            else self._quantized(weight, how)
        )
        self._weight_names[value] = weight.origin or weight.name
        return value

    def _declared(self, weight: Weight) -> ir.Value:
        self.weights.append(weight)
        placeholder = ir.ExternalTensor(
            "", None, None, ir_dtype(weight.dtype), shape=ir.Shape(weight.shape), name=weight.name
        )
        return self._initializer(weight.name, placeholder)

    def _quantized(self, weight: Weight, how: WeightFormat) -> ir.Value:
        """Values and scales, and the DequantizeLinear that must come before anything else: TensorRT takes no other reader of few bits.

        A scale a row is one axis of scales for a matrix and blocks as long as a row for stacked
        ones; groups are blocks.
        """
        whole = replace(weight, origin=weight.origin or weight.name, format=how)
        columns = weight.shape[-1]
        blocked = bool(how.group) or len(weight.shape) > 2
        shape = (*weight.shape[:-1], how.groups(columns)) if blocked else weight.shape[:1]
        values = self._declared(replace(whole, dtype=how.dtype, part="values"))
        scales = replace(
            whole,
            name=f"{weight.name}.scale",
            shape=shape,
            dtype=how.scale_dtype or self.dtype,
            part="scale",
        )
        scale = self._declared(scales)
        if how.scale_dtype:
            shared = self._declared(
                replace(
                    whole,
                    name=f"{weight.name}.global_scale",
                    shape=(),
                    dtype=self.dtype,
                    part="global_scale",
                )
            )
            scale = self.op("DequantizeLinear", scale, shared)
        if blocked:
            return self.op(
                "DequantizeLinear",
                values,
                scale,
                axis=len(weight.shape) - 1,
                block_size=how.group or columns,
            )
        return self.op("DequantizeLinear", values, scale, axis=0)

    def to_float32(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == "float32" else self.op("Cast", x, to=ir.DataType.FLOAT)

    def to_model_dtype(self, x: ir.Value) -> ir.Value:
        return x if self.dtype == "float32" else self.op("Cast", x, to=ir_dtype(self.dtype))

    def reshape(self, x: ir.Value, *shape: int | ir.Value) -> ir.Value:
        """Reshape where 0 keeps an input dimension and -1 takes what is left.

        A size that is a value, [1] int64, is known when the graph runs.
        """
        fixed = [size for size in shape if isinstance(size, int)]
        if len(fixed) == len(shape):
            return self.op("Reshape", x, self.constant(fixed))
        parts = [self.constant([size]) if isinstance(size, int) else size for size in shape]
        key = ",".join(str(size) if isinstance(size, int) else str(size.name) for size in shape)
        target = self.shared(f"shape {key}", lambda: self.op("Concat", *parts, axis=0))
        return self.op("Reshape", x, target)

    def linear(self, x: ir.Value, weight: ir.Value, *, visited: ir.Value | None = None) -> ir.Value:
        """X W^T with W as the checkpoint stores it, [out, in], or stacked [E, out, in]; readers fold the transpose into the product.

        `visited` [E,N,1] float32 is above 0 where a row of x is used at all: rows nobody reads say
        nothing about its range.
        """
        x = self._as_input(x, self._weight_names[weight], visited)
        perm = [0, 2, 1] if self._rank(weight) == 3 else [1, 0]
        return self.op("MatMul", x, self.op("Transpose", weight, perm=perm))

    def linear_exact(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """The same with x as it is, whatever other products of x read."""
        return self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))

    def _rank(self, weight: ir.Value) -> int:
        node = weight.producer()
        values = weight if node is None else node.inputs[0]
        assert values is not None and values.shape is not None
        return len(values.shape)

    def _as_input(self, x: ir.Value, name: str, visited: ir.Value | None) -> ir.Value:
        """X as a product with that weight reads it: noted for those who watch ranges, and rounded to few bits if that is wanted.

        Products of one input share its rounding, and its name is that of the first.
        """
        if x in self._rounded:
            return self._rounded[x]
        assert x.name is not None
        known = next((tap for tap in self.taps.values() if tap.value == x.name), None)
        if known is None:
            self.taps[name] = Tap(name, x.name, visited.name if visited is not None else None)
        how = self.precision.activations.get(known.weight if known else name)
        if how is None:
            return x
        scale = self._typed(how.scale, self.dtype)
        few = self.op("QuantizeLinear", x, scale, output_dtype=ir_dtype(how.dtype))
        self._rounded[x] = self.op("DequantizeLinear", few, scale)
        return self._rounded[x]

    def _typed(self, value: float, dtype: str) -> ir.Value:
        """A scalar initializer of a type numpy may not know: readers want a quantization's scale to be a constant."""
        array = np.asarray(value, dtype=np.float64).astype(numpy_dtype(dtype))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

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
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        self._initializers[name] = value
        return value

    def _next_value(self) -> str:
        self._values += 1
        return f"v{self._values}"

    def _name(self, op_type: str) -> str:
        stem = f"{self._scope}{op_type}"
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        return f"{stem}_{count}" if count else stem


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name, type=ir.TensorType(ir_dtype(spec.dtype)), shape=ir.Shape(spec.axes)
    )
