"""Rules about single operators: which must not occur, with which attributes others must not, and quantization in forms TensorRT reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from twotower.graph_lint.rule import BUILT, Complaint, Rule, Severity, each, where
from twotower.graph_lint.view import UNKNOWN, GraphView, type_name

__all__ = ["ABSENT_OPERATORS", "OPERATOR_RULES", "QUANTIZATION_RULES"]

_NEWEST_OPSET = 24
_TOPK_LIMIT = 3840

_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit")
_CONTROL = ("Loop", "Scan", "If")
_PLUGINS = ("LinearAttention", "CausalConvWithState", "FlexAttention")
ABSENT_OPERATORS = (
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BitCast", "CumProd", "SwiGLU", "Multinomial", "Bernoulli",
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "AffineGrid", "CenterCropPad", "Col2Im",
    "DeformConv", "DFT", "Det", "MelWeightMatrix", "MaxRoiPool", "MaxUnpool", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss",
    "Optional", "OptionalGetElement", "OptionalHasElement", "ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
    "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence", "ImageDecoder", "RegexFullMatch", "StringConcat",
    "StringNormalizer", "TfIdfVectorizer",
)  # fmt: skip
"""Operators of ONNX that the parser does not know."""

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_EXPONENTIALS = ("Exp", "Softplus", "Softmax", "LogSoftmax", "ReduceLogSumExp")
_QUANTIZERS = (
    "TRT_FP4DynamicQuantize",
    "TRT_MXFP8DynamicQuantize",
    "TRT_MXFP8DequantizeLinear",
)  # there is no standard form of these


def _present(view: GraphView, node: onnx.NodeProto) -> str:
    return f"operator {node.op_type}"


def _foreign(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        allowed = view.fixed and node.domain == "trt" and node.op_type in _QUANTIZERS
        if node.domain not in ("", "ai.onnx") and not allowed:
            yield where(node), f"operator {node.domain}::{node.op_type}"


def _opset(view: GraphView) -> Iterator[Complaint]:
    for entry in view.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > _NEWEST_OPSET:
            yield "the model", f"opset {entry.version}"


def _functions(view: GraphView) -> Iterator[Complaint]:
    for function in view.model.functions:
        yield "the model", f"local function {function.domain}::{function.name}"


def _reduction(view: GraphView, node: onnx.NodeProto) -> str | None:
    kind = view.attribute(node, "reduction", "none")
    return f'reduction="{kind}"' if kind != "none" else None


def _topk(view: GraphView, node: onnx.NodeProto) -> str | None:
    count = view.constant(view.operand(node, 1))
    if count is None:
        return "k is not a constant"
    k = int(count.reshape(-1)[0])
    return f"k = {k}" if k > _TOPK_LIMIT else None


def _stash(view: GraphView, node: onnx.NodeProto) -> str | None:
    kind = view.attribute(node, "stash_type", onnx.TensorProto.FLOAT)
    return f"stash_type = {kind}" if kind != onnx.TensorProto.FLOAT else None


def _half(view: GraphView, node: onnx.NodeProto) -> str | None:
    dtype = view.dtype(view.operand(node, 0))
    return f"{node.op_type} in {dtype}" if dtype in ("float16", "bfloat16") else None


OPERATOR_RULES: tuple[Rule, ...] = (
    Rule("opset", "the model", f"an opset above {_NEWEST_OPSET}",
         "the parser's documentation ends there, although it reads newer numbers without a word", f"opset {_NEWEST_OPSET}",
         "TensorRT 11 operator documentation: 9 to 24", _opset),
    Rule("standard-operators", "every operator", f"a domain of its own; in a graph about to be built {', '.join(_QUANTIZERS)} may be",
         "ONNX Runtime cannot check it, and TensorRT matches by name alone: an Add of any domain is its Add",
         "operators of the default domain", BUILT, _foreign),
    Rule("no-functions", "the model", "local functions", "the parser expands them in its own way, and these rules do not look inside",
         "the operators themselves", "this project's dialect", _functions),
    Rule("no-cumsum", "CumSum", "any", "several with different axes or directions are miscompiled: wrong numbers, no error",
         "a product with a constant lower-triangular matrix", "NVIDIA/TensorRT #4551, #4513; onnx/onnx-tensorrt #1034",
         each("CumSum", _present)),
    Rule("no-data-dependent-output", ", ".join(_DATA_DEPENDENT), "any",
         "the size of the result is known only when it runs: most are refused, and none can be captured into a CUDA graph",
         "masks over a fixed size", BUILT, each(_DATA_DEPENDENT, _present)),
    Rule("no-control-flow", ", ".join(_CONTROL), "any", "values that grow fail to build, and these rules do not look into bodies",
         "the chunk form of a recurrence; loops in the runtime", BUILT, each(_CONTROL, _present)),
    Rule("no-plugin-operators", ", ".join(_PLUGINS), "any", "known by name only: they need a plugin that no wheel ships, and parsing fails",
         "MatMul, Conv and elementwise operators", BUILT, each(_PLUGINS, _present)),
    Rule("no-absent-operators", ", ".join(ABSENT_OPERATORS), "any", "the parser does not know them",
         "int64 arithmetic for bits, quantization around MatMul for integer products, noise as an input for draws", BUILT,
         each(ABSENT_OPERATORS, _present)),
    Rule("no-randomness", ", ".join(_RANDOM), "any", "seeds are ignored, or at best cannot be reproduced by another library",
         "noise as an input, drawn by the runtime", "onnx-tensorrt operator documentation; equal seeds mean equal text",
         each(_RANDOM, _present)),
    Rule("no-scatter-reduction", "ScatterND, ScatterElements", "a reduction", "rejected at parsing", "a dense routing matrix and a product",
         BUILT, each(("ScatterND", "ScatterElements"), _reduction)),
    Rule("topk-limit", "TopK", f"a k above {_TOPK_LIMIT}, or one that is computed",
         f'parses, then fails to build ("exceeds {_TOPK_LIMIT}"); a computed k has no profile', "a smaller constant k", BUILT,
         each("TopK", _topk)),
    Rule("no-trilu", "Trilu", "any", "becomes 19 layers that compare positions", "a constant, or one comparison of positions", BUILT,
         each("Trilu", _present), Severity.NOTE),
    Rule("wide-normalization", "RMSNormalization, LayerNormalization", "a stash_type other than float32",
         "the mean square is taken in that type, and squares overflow float16 at 256", "stash_type 1", BUILT,
         each(("RMSNormalization", "LayerNormalization"), _stash)),
    Rule("wide-exponentials", ", ".join(_EXPONENTIALS), "half precision",
         "e^x overflows float16 above 11, and this model's dt biases reach 33.5; a bundle promises float32 for scan and softmax",
         "a cast to float32 before", "NVIDIA/TensorRT-Model-Connect, Nemotron-H; the published model", each(_EXPONENTIALS, _half)),
    Rule("reductions-drop-nan", "ReduceMax, ReduceMin", "the only guard against NaN", "TensorRT's drop a NaN that ONNX Runtime passes on",
         "a check of the result", "measured by NVIDIA/trt-samples-for-hackathon-cn on 11.1", each(("ReduceMax", "ReduceMin"), _present),
         Severity.NOTE),
)  # fmt: skip
"""Rules about operators."""


_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_BOTH = (_QUANTIZE, _DEQUANTIZE)
_SCALE, _ZERO = 1, 2
_NARROW = ("int8", "int4", "float8e4m3fn", "float4e2m1")
_FLOATS = _NARROW[1:]  # int8 is also a type to compute with
_CARRIES = frozenset(
    {"Concat", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Identity"}
)


def _type(view: GraphView, node: onnx.NodeProto) -> str | None:
    """The type of the quantized side. Without a zero point or an output_dtype it is uint8, says ONNX."""
    if node.op_type == _DEQUANTIZE:
        dtype = view.dtype(view.operand(node, 0))
    elif zero := view.operand(node, _ZERO):
        dtype = view.dtype(zero)
    else:
        dtype = type_name(view.attribute(node, "output_dtype", 0))
        dtype = (
            "uint8, because neither zero point nor output_dtype is given"
            if dtype == UNKNOWN
            else dtype
        )
    return None if dtype in (*_NARROW, UNKNOWN) else f"quantized as {dtype}"


def _zero_point(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, _ZERO))
    return (
        "a zero point that is not zero"
        if value is not None and np.any(value.astype(np.float32))
        else None
    )


def _scale(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, _SCALE))
    if value is None:
        return None
    wide = value.astype(np.float32)
    return (
        None
        if np.all(wide > 0) and np.all(np.isfinite(wide))
        else f"a scale of {wide.reshape(-1)[np.argmin(wide)]:g}"
    )


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
                node.op_type
                for node in view.readers.get(name, ())
                if node.op_type not in _BOTH and not node.op_type.startswith("TRT_")
            }
            if wrong:
                yield name, f"{type_name(tensor.data_type)}, read by {', '.join(sorted(wrong))}"


def _read(view: GraphView) -> Iterator[Complaint]:
    for name, nodes in view.readers.items():
        if name in view.initializers or view.dtype(name) not in _FLOATS:
            continue
        wrong = {
            n.op_type
            for n in nodes
            if n.op_type not in (*_BOTH, *_CARRIES) and not n.op_type.startswith("TRT_")
        }
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
