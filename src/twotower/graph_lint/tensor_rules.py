"""Rules about values: their types, their shapes, and whether anything reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from twotower.graph_lint.rule import BUILT, Complaint, Rule, Rules, where
from twotower.graph_lint.view import UNKNOWN, GraphView, type_name

_HALF = ("float16", "bfloat16")
_LARGEST_FLOAT16 = 65504.0
_TYPES = (
    *("float32", "float16", "bfloat16", "int64", "int32", "bool"),
    *("int8", "int4", "float8e4m3fn", "float4e2m1"),
)

_ALIKE: Mapping[tuple[int, ...] | None, tuple[str, ...]] = {
    (0, 1): (
        *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "MatMul", "RMSNormalization", "PRelu"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
    ),
    (0, 1, 2): ("Gemm", "Conv", "ConvTranspose", "LayerNormalization", "RotaryEmbedding"),
    (0, 2): ("ScatterElements", "ScatterND", "Pad"),
    (1, 2): ("Where",),
    None: ("Concat", "Einsum", "Max", "Min", "Sum", "Mean", "Clip", "Range"),
}
"""Operands that must have one type, and of which operators; None for all."""

_SHAPES: Mapping[tuple[int, ...], tuple[str, ...]] = {
    (1,): (
        *("Reshape", "Expand", "Tile", "Unsqueeze", "Squeeze", "Split", "OneHot"),
        *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"),
        *("ReduceLogSumExp", "ReduceL1", "ReduceL2"),
    ),
    (0,): ("ConstantOfShape",),
    (0, 1, 2): ("Range",),
    (1, 2, 3, 4): ("Slice",),
    (1, 3): ("Pad",),
    (2, 3): ("Resize",),
}
"""Operands that decide a shape, and of which operators. TopK's is in a rule of its own."""


def _quantizes(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.op_type.startswith("TRT_")


TENSOR_RULES = Rules()
"""Rules about values."""


@TENSOR_RULES.of_graph(
    Rule(
        "one-type",
        "operands",
        "different types in one operator",
        'rejected at parsing ("must have same input types"); Pow and RMSNormalization are '
        "converted silently",
        "a Cast",
        BUILT,
    )
)
def _mixed(view: GraphView) -> Iterator[Complaint]:
    operands = {kind: indices for indices, kinds in _ALIKE.items() for kind in kinds}
    for node in view.nodes:
        if node.op_type not in operands:
            continue
        indices = operands[node.op_type]
        dtypes = []
        for i, name in enumerate(node.input):
            if name and (indices is None or i in indices):
                dtypes.append(view.dtype(name))
        if len(set(dtypes) - {UNKNOWN}) > 1:
            yield where(node), f"{node.op_type}({', '.join(dtypes)})"


@TENSOR_RULES.of_graph(
    Rule(
        "known-types",
        "all values",
        "float64 and other types TensorRT lacks; uint8 inside",
        "float64 is narrowed to float32 silently, others are rejected",
        "float32, int64",
        BUILT,
    )
)
def _types(view: GraphView) -> Iterator[Complaint]:
    ends = view.inputs | view.outputs
    names = {name for node in view.nodes for name in (*node.input, *node.output) if name}
    for name in sorted(names | ends):
        dtype = view.dtype(name)
        if dtype in (*_TYPES, UNKNOWN) or (dtype == "uint8" and name in ends):
            continue
        maker, readers = view.producers.get(name), view.readers.get(name, ())
        quantized = [_quantizes(node) for node in readers]
        # Else the type is the business of the rules about quantization.
        if not (maker and _quantizes(maker)) and not (quantized and all(quantized)):
            yield name, dtype


@TENSOR_RULES.of_graph(
    Rule(
        "finite-constants",
        "constants in float16 and bfloat16",
        "infinite, also by a cast of a larger number",
        "a row that is masked throughout is NaN, and 0 times it too; the least float32 is "
        "minus infinity in float16",
        "a boolean mask, or a large finite number",
        "IEEE 754",
    )
)
def _infinite(view: GraphView) -> Iterator[Complaint]:
    for name in view.initializers:
        dtype = view.dtype(name)
        value = view.constant(name) if dtype in _HALF else None
        if value is not None and np.isinf(value.astype(np.float32)).any():
            yield name, f"an infinite {dtype}"
    for node in view.nodes:
        if node.op_type != "Cast" or view.attribute(node, "to") != onnx.TensorProto.FLOAT16:
            continue
        value = view.constant(view.operand(node, 0))
        if value is None:
            continue
        wide = value.astype(np.float64).reshape(-1)
        largest = wide[np.argmax(np.abs(wide))] if wide.size else 0.0
        if abs(largest) > _LARGEST_FLOAT16:
            yield where(node), f"a cast of {largest:.3g} to float16"


@TENSOR_RULES.of_graph(
    Rule(
        "inferable",
        "all values",
        "a type that ONNX cannot infer",
        "no rule about types sees it; operands that do not fit do this",
        "operands that fit; the operator as its opset has it",
        "onnx.shape_inference",
    )
)
def _untyped(view: GraphView) -> Iterator[Complaint]:
    """Only where it begins: what follows from an unknown value is unknown too."""
    for node in view.nodes:
        unknown = [name for name in node.output if name and name not in view.inferred]
        known_inputs = all(view.dtype(name) != UNKNOWN for name in node.input if name)
        if unknown and not node.domain and known_inputs:
            yield where(node), f"nothing is known of {', '.join(unknown)}"


@TENSOR_RULES.of_graph(
    Rule(
        "declared-types",
        "outputs",
        "declared in another type than computed",
        "an engine's output has the computed type: whoever binds the declared one reads noise",
        "a Cast",
        BUILT,
    )
)
def _declared(view: GraphView) -> Iterator[Complaint]:
    for name, kind in view.declared.items():
        made = view.inferred.get(name, kind)
        if made.elem_type != kind.elem_type:
            declared, computed = type_name(kind.elem_type), type_name(made.elem_type)
            yield name, f"declared {declared}, computed in {computed}"


@TENSOR_RULES.of_graph(
    Rule(
        "inputs-are-read",
        "inputs",
        "unread",
        "the parser drops them with one warning; whoever binds them believes they count",
        "no such input",
        BUILT,
    )
)
def _unread(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs - view.readers.keys()):
        yield name, "no operator reads this input"


@TENSOR_RULES.of_graph(
    Rule(
        "inputs-are-values",
        "inputs",
        "read for their shape alone",
        "a constant shape is folded and the input dropped",
        "fixed axes, or no such input",
        BUILT,
        built_only=True,
    )
)
def _shape_only(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs & view.readers.keys()):
        if {node.op_type for node in view.readers[name]} <= {"Shape", "Size"}:
            yield name, "only the shape of this input is read"


@TENSOR_RULES.of_graph(
    Rule(
        "shapes-from-shapes",
        "Reshape, Expand, Slice, Range, axes of reductions, ...",
        "a shape that depends on values",
        "it has no profile, and memory cannot be planned for a CUDA graph",
        "a fixed size and a mask",
        "TensorRT 11 documentation, CUDA graphs; data-dependent shapes",
    )
)
def _shapes(view: GraphView) -> Iterator[Complaint]:
    operands = {kind: indices for indices, kinds in _SHAPES.items() for kind in kinds}
    for node in view.nodes:
        for index in operands.get(node.op_type, ()):
            if view.operand(node, index) in view.data_dependent:
                values = node.input[index]
                yield where(node), f"{node.op_type} takes its shape from the values in {values}"


@TENSOR_RULES.of_graph(
    Rule(
        "named-axes",
        "inputs and outputs",
        "an axis without size or name",
        "no profile can be made for it",
        "a letter of the contract",
        "this project's contract (spec.py)",
    )
)
def _unnamed(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs | view.outputs):
        shape = view.shape(name)
        if shape is None or None in shape:
            yield name, "an axis has neither a size nor a name"
