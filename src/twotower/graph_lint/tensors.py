"""Rules about values: their types, their shapes, and whether anything reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from twotower.graph_lint.rule import Complaint, Rule
from twotower.graph_lint.view import GraphView, type_name

__all__ = ["TENSOR_RULES"]

_BUILT = "parsed and built with TensorRT for RTX 1.7.1"

_TYPES = frozenset(
    {"float32", "float16", "bfloat16", "int64", "int32", "int8", "int4", "uint4", "bool", "float8e4m3fn", "float4e2m1", "unknown"}
)

# Operands that must have one type.
_ALIKE: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "MatMul", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), (0, 1)),
    **dict.fromkeys(("Gemm", "Conv"), (0, 1, 2)),
    **dict.fromkeys(("Where",), (1, 2)),
    **dict.fromkeys(("ScatterElements", "ScatterND"), (0, 2)),
    **dict.fromkeys(("RMSNormalization", "Pow"), (0, 1)),
}
_ALL_ALIKE = frozenset({"Concat", "Einsum", "Max", "Min", "Sum", "Mean"})

# Operands that decide a shape; -1 means every operand.
_SHAPES: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "TopK", "Unsqueeze", "Squeeze", "Split", "OneHot", "Pad"), (1,)),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Resize": (2, 3),
    "CenterCropPad": (1,),
}


def _where(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} that makes {', '.join(node.output)}"


def _mixed(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        every = tuple(range(len(node.input))) if node.op_type in _ALL_ALIKE else _ALIKE.get(node.op_type, ())
        dtypes = [view.dtype(name) for i in every if (name := view.operand(node, i))]
        if len(set(dtypes) - {"unknown"}) > 1:
            yield _where(node), f"{node.op_type}({', '.join(dtypes)})"


def _types(view: GraphView) -> Iterator[Complaint]:
    names = {name for node in view.nodes for name in (*node.input, *node.output) if name} | view.inputs | view.outputs
    for name in sorted(names):
        if (dtype := view.dtype(name)) not in _TYPES:
            yield name, dtype
    for node in view.nodes:
        if node.op_type == "Cast" and (dtype := type_name(view.attribute(node, "to", 0))) not in _TYPES and view.dtype(node.output[0]) == "unknown":
            yield _where(node), f"a cast to {dtype}"


def _unread(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs - view.read):
        yield name, "no operator reads this input"


def _shape_only(view: GraphView) -> Iterator[Complaint]:
    readers: dict[str, set[str]] = {}
    for node in view.nodes:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    for name in sorted(view.inputs & view.read):
        if readers[name] <= {"Shape", "Size"}:
            yield name, "only the shape of this input is read"


def _shapes(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        for index in _SHAPES.get(node.op_type, ()):
            if view.operand(node, index) in view.data_dependent:
                yield _where(node), f"{node.op_type} takes its shape from the values in {node.input[index]}"


def _no_rank(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs | view.outputs):
        if view.shape(name) is None or None in (view.shape(name) or ()):
            yield name, "an axis has neither a size nor a name"


TENSOR_RULES: tuple[Rule, ...] = (
    Rule("one-type", "operands", "different types in one operator", 'rejected at parsing ("must have same input types") or promoted silently elsewhere',
         "a Cast", "TensorRT 11: strong typing is the only mode", _mixed),
    Rule("known-types", "all values", "float64 and other types TensorRT lacks", "float64 is narrowed without a word, others are rejected", "float32, int64",
         "TensorRT 11 documentation, data types", _types),
    Rule("inputs-are-read", "inputs", "unread", "the parser drops them with one warning; whoever binds them believes they count", "no such input",
         _BUILT, _unread),
    Rule("inputs-are-values", "inputs", "read for their shape alone", "a constant shape is folded and the input dropped", "fixed axes, or no such input",
         _BUILT, _shape_only, built_only=True),
    Rule("shapes-from-shapes", "Reshape, Expand, Slice, Range, ...", "a shape that depends on values", "memory must be planned when it runs: no profile, no graph capture",
         "a fixed size and a mask", "TensorRT 11 documentation, CUDA graphs; data-dependent shapes", _shapes),
    Rule("named-axes", "inputs and outputs", "an axis without size or name", "no profile can be made for it", "a letter of the contract",
         "this project's contract (spec.py)", _no_rank),
)  # fmt: skip
"""Rules about values."""
