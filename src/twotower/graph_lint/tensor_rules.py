"""Rules about values: their types, their shapes, and whether anything reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from twotower.graph_lint.rule import BUILT, Complaint, Rule, where
from twotower.graph_lint.view import UNKNOWN, GraphView, type_name

__all__ = ["TENSOR_RULES"]

_HALF = ("float16", "bfloat16")
_LARGEST_FLOAT16 = 65504.0
_TYPES = frozenset(
    {
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "bool",
        "int8",
        "int4",
        "float8e4m3fn",
        "float4e2m1",
    }
)

# Operands that must have one type; None for all.
_ALIKE: Mapping[str, tuple[int, ...] | None] = {
    **dict.fromkeys(
        (
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Pow",
            "Mod",
            "MatMul",
            "Equal",
            "Less",
            "LessOrEqual",
            "Greater",
            "GreaterOrEqual",
        ),
        (0, 1),
    ),
    **dict.fromkeys(
        ("Gemm", "Conv", "ConvTranspose", "LayerNormalization", "RotaryEmbedding"), (0, 1, 2)
    ),
    **dict.fromkeys(("RMSNormalization", "PRelu"), (0, 1)),
    **dict.fromkeys(("ScatterElements", "ScatterND", "Pad"), (0, 2)),
    "Where": (1, 2),
    **dict.fromkeys(("Concat", "Einsum", "Max", "Min", "Sum", "Mean", "Clip", "Range"), None),
}

# Operands that decide a shape. TopK's is in a rule of its own.
_SHAPES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Unsqueeze", "Squeeze", "Split", "OneHot"), (1,)),
    **dict.fromkeys(
        (
            "ReduceSum",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceLogSumExp",
            "ReduceL1",
            "ReduceL2",
        ),
        (1,),
    ),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (2, 3),
}


def _mixed(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type in _ALIKE:
            indices = _ALIKE[node.op_type]
            dtypes = [
                view.dtype(name)
                for i, name in enumerate(node.input)
                if name and (indices is None or i in indices)
            ]
            if len(set(dtypes) - {UNKNOWN}) > 1:
                yield where(node), f"{node.op_type}({', '.join(dtypes)})"


def _types(view: GraphView) -> Iterator[Complaint]:
    names = (
        {name for node in view.nodes for name in (*node.input, *node.output) if name}
        | view.inputs
        | view.outputs
    )
    for name in sorted(names):
        dtype = view.dtype(name)
        passed_through = dtype == "uint8" and name in view.inputs | view.outputs
        if dtype not in (*_TYPES, UNKNOWN) and not passed_through and not _quantized(view, name):
            yield name, dtype


def _quantized(view: GraphView, name: str) -> bool:
    """Whether a value's type is the business of the rules about quantization."""
    maker, readers = view.producers.get(name), view.readers.get(name, ())
    return (maker is not None and _quantizes(maker)) or (
        bool(readers) and all(map(_quantizes, readers))
    )


def _quantizes(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.op_type.startswith("TRT_")


def _infinite(view: GraphView) -> Iterator[Complaint]:
    for name, tensor in view.initializers.items():
        value = view.constant(name) if type_name(tensor.data_type) in _HALF else None
        if value is not None and np.isinf(value.astype(np.float32)).any():
            yield name, f"an infinite {type_name(tensor.data_type)}"
    for node in view.nodes:
        given = (
            view.constant(view.operand(node, 0))
            if node.op_type == "Cast" and view.attribute(node, "to") == onnx.TensorProto.FLOAT16
            else None
        )
        if given is not None and (np.abs(given.astype(np.float64)) > _LARGEST_FLOAT16).any():
            yield (
                where(node),
                f"a cast of {given.astype(np.float64).reshape(-1)[np.argmax(np.abs(given.astype(np.float64)))]:.3g} to float16",
            )


def _untyped(view: GraphView) -> Iterator[Complaint]:
    """Only where it begins: what follows from an unknown value is unknown too."""
    for node in view.nodes:
        unknown = [name for name in node.output if name and name not in view.inferred]
        if (
            unknown
            and not node.domain
            and all(view.dtype(name) != UNKNOWN for name in node.input if name)
        ):
            yield where(node), f"nothing is known of {', '.join(unknown)}"


def _declared(view: GraphView) -> Iterator[Complaint]:
    for name, kind in view.declared.items():
        if name in view.inferred and view.inferred[name].elem_type != kind.elem_type:
            yield (
                name,
                f"declared {type_name(kind.elem_type)}, computed in {type_name(view.inferred[name].elem_type)}",
            )


def _unread(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs - view.readers.keys()):
        yield name, "no operator reads this input"


def _shape_only(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs & view.readers.keys()):
        if {node.op_type for node in view.readers[name]} <= {"Shape", "Size"}:
            yield name, "only the shape of this input is read"


def _shapes(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        for index in _SHAPES.get(node.op_type, ()):
            if view.operand(node, index) in view.data_dependent:
                yield (
                    where(node),
                    f"{node.op_type} takes its shape from the values in {node.input[index]}",
                )


def _unnamed(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs | view.outputs):
        if view.shape(name) is None or None in (view.shape(name) or ()):
            yield name, "an axis has neither a size nor a name"


TENSOR_RULES: tuple[Rule, ...] = (
    Rule("one-type", "operands", "different types in one operator",
         'rejected at parsing ("must have same input types"); Pow and RMSNormalization are converted without a word', "a Cast", BUILT,
         _mixed),
    Rule("known-types", "all values", "float64 and other types TensorRT lacks; uint8 inside",
         "float64 is narrowed to float32 without a word, others are rejected", "float32, int64", BUILT, _types),
    Rule("finite-constants", "constants in float16 and bfloat16", "infinite, also by a cast of a larger number",
         "a row that is masked throughout is NaN, and 0 times it too; the least float32 is minus infinity in float16",
         "a boolean mask, or a large finite number", "IEEE 754", _infinite),
    Rule("inferable", "all values", "a type that ONNX cannot infer", "no rule about types sees it; operands that do not fit do this",
         "operands that fit; the operator as its opset has it", "onnx.shape_inference", _untyped),
    Rule("declared-types", "outputs", "declared in another type than computed",
         "an engine's output has the computed type: whoever binds the declared one reads noise", "a Cast", BUILT, _declared),
    Rule("inputs-are-read", "inputs", "unread", "the parser drops them with one warning; whoever binds them believes they count",
         "no such input", BUILT, _unread),
    Rule("inputs-are-values", "inputs", "read for their shape alone", "a constant shape is folded and the input dropped",
         "fixed axes, or no such input", BUILT, _shape_only, built_only=True),
    Rule("shapes-from-shapes", "Reshape, Expand, Slice, Range, axes of reductions, ...", "a shape that depends on values",
         "it has no profile, and memory cannot be planned for a CUDA graph", "a fixed size and a mask",
         "TensorRT 11 documentation, CUDA graphs; data-dependent shapes", _shapes),
    Rule("named-axes", "inputs and outputs", "an axis without size or name", "no profile can be made for it", "a letter of the contract",
         "this project's contract (spec.py)", _unnamed),
)  # fmt: skip
"""Rules about values."""
