"""Rules about QuantizeLinear and DequantizeLinear: few bits are fine, in the forms TensorRT reads as ONNX means them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from twotower.graph_lint.rule import BUILT, Complaint, Rule, each
from twotower.graph_lint.view import UNKNOWN, GraphView, type_name

__all__ = ["QUANTIZATION_RULES"]

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_BOTH = (_QUANTIZE, _DEQUANTIZE)
_SCALE, _ZERO = 1, 2
_NARROW = ("int8", "int4", "float8e4m3fn", "float4e2m1")
_FLOATS = _NARROW[1:]  # int8 is also a type to compute with
_CARRIES = frozenset({"Concat", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Identity"})


def _type(view: GraphView, node: onnx.NodeProto) -> str | None:
    """The type of the quantized side. Without a zero point or an output_dtype it is uint8, says ONNX."""
    if node.op_type == _DEQUANTIZE:
        dtype = view.dtype(view.operand(node, 0))
    elif zero := view.operand(node, _ZERO):
        dtype = view.dtype(zero)
    else:
        dtype = type_name(view.attribute(node, "output_dtype", 0))
        dtype = "uint8, because neither zero point nor output_dtype is given" if dtype == UNKNOWN else dtype
    return None if dtype in (*_NARROW, UNKNOWN) else f"quantized as {dtype}"


def _zero_point(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, _ZERO))
    return "a zero point that is not zero" if value is not None and np.any(value.astype(np.float32)) else None


def _scale(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, _SCALE))
    if value is None:
        return None
    wide = value.astype(np.float32)
    return None if np.all(wide > 0) and np.all(np.isfinite(wide)) else f"a scale of {wide.reshape(-1)[np.argmin(wide)]:g}"


def _blocks(view: GraphView, node: onnx.NodeProto) -> str | None:
    block, axis = view.attribute(node, "block_size", 0), view.attribute(node, "axis", 1)
    shape = view.shape(view.operand(node, 0))
    if not block or not shape or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    return f"{size} in blocks of {block}" if isinstance(size, int) and size % block else None


def _stored(view: GraphView) -> Iterator[Complaint]:
    for name, tensor in view.initializers.items():
        if type_name(tensor.data_type) in _NARROW:
            wrong = {
                node.op_type for node in view.readers.get(name, ()) if node.op_type not in _BOTH and not node.op_type.startswith("TRT_")
            }
            if wrong:
                yield name, f"{type_name(tensor.data_type)}, read by {', '.join(sorted(wrong))}"


def _read(view: GraphView) -> Iterator[Complaint]:
    for name, nodes in view.readers.items():
        if name in view.initializers or view.dtype(name) not in _FLOATS:
            continue
        wrong = {n.op_type for n in nodes if n.op_type not in (*_BOTH, *_CARRIES) and not n.op_type.startswith("TRT_")}
        if wrong:
            yield name, f"{view.dtype(name)}, read by {', '.join(sorted(wrong))}"


QUANTIZATION_RULES: tuple[Rule, ...] = (
    Rule("quantized-type", ", ".join(_BOTH), f"a type other than {', '.join(_NARROW)}",
         "rejected; but uint8, ONNX's choice where neither zero point nor output_dtype is given, becomes int8 without an error",
         "a zero point of the type, or output_dtype", BUILT, each(_BOTH, _type)),
    Rule("quantized-symmetric", ", ".join(_BOTH), "a zero point other than zero", "rejected at parsing", "symmetric scales", BUILT,
         each(_BOTH, _zero_point)),
    Rule("quantized-scale", ", ".join(_BOTH), "a constant scale that is not positive and finite",
         'rejected at parsing: "must all be positive"', "a positive scale, also for a channel of zeros", BUILT, each(_BOTH, _scale)),
    Rule("quantized-blocks", ", ".join(_BOTH), "a block_size that does not divide its axis",
         'rejected at parsing: "must divide into whole blocks"; ONNX allows a shorter last block', "a block size that divides, or padding",
         BUILT, each(_BOTH, _blocks)),
    Rule("quantized-weights", f"weights in {', '.join(_NARROW)}", "read by an operator other than DequantizeLinear",
         "fails to build, a Transpose or Gather of the stored weight too", "DequantizeLinear first", BUILT, _stored),
    Rule("quantized-values", f"values in {', '.join(_FLOATS)}", "read by arithmetic or a Cast", "fails to build", "DequantizeLinear first",
         BUILT, _read),
)  # fmt: skip
"""Rules about quantization."""
