"""A thin recorder over onnx-ir: operators by name, shared constants, declared weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from twotower.config import ModelConfig
from twotower.dtypes import numpy_dtype, onnx_code
from twotower.export.graphs.precision import ActivationFormat, Tap
from twotower.spec import TowerSignature
from twotower.weights.declared import Weight

OPSET = 24
"""The newest opset that every reader of these graphs accepts: ONNX Runtime, TensorRT 11 and
TensorRT for RTX 1.7."""
IR_VERSION = 12


def ir_dtype(name: str) -> ir.DataType:
    """The onnx-ir element type of a dtype's plain name."""
    return ir.DataType(onnx_code(name))


class GraphBuilder:
    """Records one graph.

    Args:
        signature: Names, dtypes and axes of the graph's inputs and outputs.
        dtype: Element type of weights and of the residual stream.
        declared: The weights the graph may declare, quantized ones in their parts.
        activations: Quantized inputs of products, by the name of the product's first weight.
    """

    def __init__(
        self,
        signature: TowerSignature,
        dtype: str,
        declared: Iterable[Weight] = (),
        activations: Mapping[str, ActivationFormat] | None = None,
    ) -> None:
        self.signature = signature
        self.dtype = dtype
        self.weights: list[Weight] = []
        self.taps: dict[str, Tap] = {}
        self._parts: dict[str, list[Weight]] = {}
        for weight in declared:
            self._parts.setdefault(weight.origin or weight.name, []).append(weight)
        self._activations = activations or {}
        self._tape = tape.Tape()
        self._inputs = {
            spec.name: ir.Value(
                name=spec.name,
                type=ir.TensorType(ir_dtype(spec.dtype)),
                shape=ir.Shape(spec.axes),
            )
            for spec in signature.inputs
        }
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}
        self._outputs: dict[str, ir.Value] = {}
        self._scope = ""
        self._values = 0
        self._counts: dict[str, int] = {}
        self._weight_names: dict[ir.Value, str] = {}
        self._quantized: dict[ir.Value, ir.Value] = {}

    def input(self, name: str) -> ir.Value:
        return self._inputs[name]

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Appends one node, named with the current scope, with one output, numbered."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(
        self, op_type: str, outputs: int, *inputs: ir.Value | None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Appends one node with several outputs."""
        stem = f"{self._scope}{op_type}"
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        name = f"{stem}_{count}" if count else stem
        values = self._tape.op_multi_out(
            op_type, inputs, attributes, num_outputs=outputs, name=name
        )
        for value in values:
            self._values += 1
            value.name = f"v{self._values}"
        return values

    def mark(
        self,
        name: str,
        value: ir.Value,
    ) -> ir.Value:
        """Names a value within the current scope, so that builders find it.

        To be called before anything notes its name. Graph inputs keep the names of the contract.
        """
        if value.producer() is not None:
            value.name = f"{self._scope}{name}"
        return value

    def constant(
        self,
        data: Any,
        dtype: str = "int64",
    ) -> ir.Value:
        """A small constant; equal constants are stored once."""
        array = np.asarray(data).astype(numpy_dtype(dtype))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self._constants[key]

    def scalar(self, value: float) -> ir.Value:
        """A scalar of the model's dtype."""

        def cast() -> ir.Value:
            return self.to_model_dtype(self.constant(value, "float32"))

        return self.shared(f"scalar {value!r}", cast)

    def shared(
        self,
        key: str,
        make: Callable[[], ir.Value],
    ) -> ir.Value:
        """What `make()` recorded the first time this key was asked for: masks serve every layer."""
        if key not in self._shared:
            with self.scope("shared"):
                self._shared[key] = make()
        return self._shared[key]

    def has(self, name: str) -> bool:
        """Whether a weight of that name is to be declared."""
        return name in self._parts

    def weight(self, name: str) -> ir.Value:
        """Declares a weight by its name in a float graph; its data is streamed into a file later.

        A quantized one is read by DequantizeLinear at once: TensorRT takes no other reader.
        """
        values = []
        for part in self._parts[name]:
            self.weights.append(part)
            dtype, shape = ir_dtype(part.dtype), ir.Shape(part.shape)
            tensor = ir.ExternalTensor("", None, None, dtype, shape=shape, name=part.name)
            values.append(self._initializer(part.name, tensor))
        out = values[0]
        if len(values) > 1:
            whole, scales = self._parts[name][:2]
            scale, blocks = values[1], {}
            if len(values) > 2:
                scale = self.op("DequantizeLinear", scale, values[2])
            if len(scales.shape) > 1:
                assert whole.format is not None
                blocks["block_size"] = whole.format.group or whole.shape[-1]
            axis = len(scales.shape) - 1
            out = self.op("DequantizeLinear", out, scale, axis=axis, **blocks)
        self._weight_names[out] = name
        return out

    def to_float32(self, x: ir.Value) -> ir.Value:
        if self.dtype == "float32":
            return x
        return self.op("Cast", x, to=ir.DataType.FLOAT)

    def to_model_dtype(self, x: ir.Value) -> ir.Value:
        if self.dtype == "float32":
            return x
        return self.op("Cast", x, to=ir_dtype(self.dtype))

    def reshape(self, x: ir.Value, *shape: int | ir.Value) -> ir.Value:
        """Reshape: 0 keeps an input dimension, -1 takes the rest, a size may be [1] int64."""
        if all(isinstance(size, int) for size in shape):
            return self.op("Reshape", x, self.constant(shape))
        parts = [self.constant([size]) if isinstance(size, int) else size for size in shape]
        key = ",".join(str(size) if isinstance(size, int) else str(size.name) for size in shape)
        target = self.shared(f"shape {key}", lambda: self.op("Concat", *parts, axis=0))
        return self.op("Reshape", x, target)

    def linear(
        self,
        x: ir.Value,
        weight: ir.Value,
        *,
        visited: ir.Value | None = None,
    ) -> ir.Value:
        """X W^T with W as the checkpoint stores it, [out, in], or stacked [E, out, in].

        Readers fold the transpose into the product. `visited` [E,N,1] float32 is above 0 where a
        row of x is used: rows nobody reads say nothing about its range.
        """
        name = self._weight_names[weight]
        x = self._product_input(x, name, visited)
        stacked = len(self._parts[name][0].shape) == 3
        perm = [0, 2, 1] if stacked else [1, 0]
        return self.op(
            "MatMul",
            x,
            self.op("Transpose", weight, perm=perm),
        )

    def linear_exact(
        self,
        x: ir.Value,
        weight: ir.Value,
    ) -> ir.Value:
        """The same with x as it is, whatever other products of x read."""
        return self.op(
            "MatMul",
            x,
            self.op("Transpose", weight, perm=[1, 0]),
        )

    def _product_input(
        self,
        x: ir.Value,
        name: str,
        visited: ir.Value | None,
    ) -> ir.Value:
        """X as a product with that weight reads it: noted as a tap, and quantized where wanted.

        Products of one input share its quantization, which goes by the first one's name.
        """
        if x in self._quantized:
            return self._quantized[x]
        assert x.name is not None
        known = next((tap for tap in self.taps.values() if tap.value == x.name), None)
        if known is None:
            known = Tap(
                name,
                x.name,
                visited.name if visited is not None else None,
            )
            self.taps[name] = known
        how = self._activations.get(known.weight)
        if how is None:
            return x
        scale = self.constant(how.scale, self.dtype)
        narrow = self.op(
            "QuantizeLinear",
            x,
            scale,
            output_dtype=ir_dtype(how.dtype),
        )
        self._quantized[x] = self.op("DequantizeLinear", narrow, scale)
        return self._quantized[x]

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        """X with axes of size 1 at these places."""
        return self.op("Unsqueeze", x, self.constant(axes))

    def squeeze(
        self,
        x: ir.Value,
        axis: int,
    ) -> ir.Value:
        return self.op("Squeeze", x, self.constant([axis]))

    def sum(
        self,
        x: ir.Value,
        axis: int,
        *,
        keepdims: int = 0,
    ) -> ir.Value:
        return self.op(
            "ReduceSum",
            x,
            self.constant([axis]),
            keepdims=keepdims,
        )

    def size(
        self,
        x: ir.Value,
        axis: int,
    ) -> ir.Value:
        """The size of one axis of x, [1] int64."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def places(
        self,
        x: ir.Value,
        axis: int,
    ) -> ir.Value:
        """0, 1, ... along one axis of x, int64."""
        length = self.size(x, axis)
        zero, end = self.constant(0), self.op("Squeeze", length)
        return self.op("Range", zero, end, self.constant(1))

    def silu(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def output(
        self,
        name: str,
        value: ir.Value,
    ) -> None:
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

    def _initializer(
        self,
        name: str,
        tensor: Any,
    ) -> ir.Value:
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape),
            const_value=tensor,
        )
        self._initializers[name] = value
        return value


@dataclass(frozen=True, slots=True)
class Layer:
    """Where a part of the model is recorded; `prefix` begins the names of its weights."""

    graph: GraphBuilder
    config: ModelConfig
    prefix: str = ""
    number: int = -1

    def weight(self, name: str) -> ir.Value:
        return self.graph.weight(self.prefix + name)

    def has(self, name: str) -> bool:
        return self.graph.has(self.prefix + name)


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What the mixers need to know of a chunk.

    Attributes:
        length: L, [1] int64.
        future: [L,L] float32, -inf where the second position is after the first and 0 elsewhere.
        until: [L,L] float32, 1 where the second position is not after the first and 0 elsewhere.
        seen: What attention may see: of the context [B,1,L,T] bool; of the denoiser [B*KV,1,T]
            float32, no score exceeds it. None for a model without attention.
        valid: [B,1,L] float32, 1 for a token and 0 for padding; None where nothing is padded (the
            denoiser's block).
        lengths: [B] int64 valid tokens; None where the state after the chunk is not wanted.
    """

    length: ir.Value
    future: ir.Value
    until: ir.Value
    seen: ir.Value | None
    valid: ir.Value | None = None
    lengths: ir.Value | None = None
