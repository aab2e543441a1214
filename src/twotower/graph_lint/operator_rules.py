"""Rules about single operators: which must not occur, and how others must not be used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from twotower.graph_lint.rule import (
    BUILT,
    Complaint,
    Rule,
    Rules,
    Severity,
    absent,
    attribute,
    each,
    where,
)
from twotower.graph_lint.view import UNKNOWN, GraphView, type_name

_FLOAT = onnx.TensorProto.FLOAT
_NEWEST_OPSET = 24
_TOPK_LIMIT = 3840

_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit")
_CONTROL = ("Loop", "Scan", "If")
_PLUGINS = ("LinearAttention", "CausalConvWithState", "FlexAttention")
ABSENT_OPERATORS = (
    "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "BitCast", "CumProd",
    "SwiGLU", "Multinomial", "Bernoulli", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "QLinearMatMul", "QLinearConv", "AffineGrid", "CenterCropPad", "Col2Im", "DeformConv", "DFT",
    "Det", "MelWeightMatrix", "MaxRoiPool", "MaxUnpool", "NegativeLogLikelihoodLoss",
    "SoftmaxCrossEntropyLoss", "Optional", "OptionalGetElement", "OptionalHasElement",
    "ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SplitToSequence", "ImageDecoder",
    "RegexFullMatch", "StringConcat", "StringNormalizer", "TfIdfVectorizer",
)  # fmt: skip
"""Operators of ONNX that the parser does not know."""

_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_EXPONENTIALS = ("Exp", "Softplus", "Softmax", "LogSoftmax", "ReduceLogSumExp")
_QUANTIZERS = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear")
"""There is no standard form of these."""


OPERATOR_RULES = Rules()
"""Rules about which operators may be there."""


@OPERATOR_RULES.of_graph(
    Rule(
        "opset",
        "the model",
        f"an opset above {_NEWEST_OPSET}",
        "the parser's documentation ends there, although it reads newer numbers silently",
        f"opset {_NEWEST_OPSET}",
        "TensorRT 11 operator documentation: 9 to 24",
    )
)
def _opset(view: GraphView) -> Iterator[Complaint]:
    for entry in view.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > _NEWEST_OPSET:
            yield "the model", f"opset {entry.version}"


@OPERATOR_RULES.of_graph(
    Rule(
        "standard-operators",
        "every operator",
        f"a domain of its own; in a graph about to be built {', '.join(_QUANTIZERS)} may be",
        "ONNX Runtime cannot check it, and TensorRT matches by name alone: an Add of any "
        "domain is its Add",
        "operators of the default domain",
        BUILT,
    )
)
def _foreign(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        allowed = view.fixed and node.domain == "trt" and node.op_type in _QUANTIZERS
        if node.domain not in ("", "ai.onnx") and not allowed:
            yield where(node), f"operator {node.domain}::{node.op_type}"


@OPERATOR_RULES.of_graph(
    Rule(
        "no-functions",
        "the model",
        "local functions",
        "the parser expands them in its own way, and these rules do not look inside",
        "the operators themselves",
        "this project's dialect",
    )
)
def _functions(view: GraphView) -> Iterator[Complaint]:
    for function in view.model.functions:
        yield "the model", f"local function {function.domain}::{function.name}"


OPERATOR_RULES.add(
    Rule(
        "no-cumsum",
        "CumSum",
        "any",
        "several with different axes or directions are miscompiled: wrong numbers, no error",
        "a product with a constant lower-triangular matrix",
        "NVIDIA/TensorRT #4551, #4513; onnx/onnx-tensorrt #1034",
    ),
    absent("CumSum"),
)
OPERATOR_RULES.add(
    Rule(
        "no-data-dependent-output",
        ", ".join(_DATA_DEPENDENT),
        "any",
        "the size of the result is known only when it runs: most are refused, and none can be "
        "captured into a CUDA graph",
        "masks over a fixed size",
        BUILT,
    ),
    absent(_DATA_DEPENDENT),
)
OPERATOR_RULES.add(
    Rule(
        "no-control-flow",
        ", ".join(_CONTROL),
        "any",
        "values that grow fail to build, and these rules do not look into bodies",
        "the chunk form of a recurrence; loops in the runtime",
        BUILT,
    ),
    absent(_CONTROL),
)
OPERATOR_RULES.add(
    Rule(
        "no-plugin-operators",
        ", ".join(_PLUGINS),
        "any",
        "known by name only: they need a plugin that no wheel ships, and parsing fails",
        "MatMul, Conv and elementwise operators",
        BUILT,
    ),
    absent(_PLUGINS),
)
OPERATOR_RULES.add(
    Rule(
        "no-absent-operators",
        ", ".join(ABSENT_OPERATORS),
        "any",
        "the parser does not know them",
        "int64 arithmetic for bits, quantization around MatMul for integer products, noise as "
        "an input for draws",
        BUILT,
    ),
    absent(ABSENT_OPERATORS),
)
OPERATOR_RULES.add(
    Rule(
        "no-randomness",
        ", ".join(_RANDOM),
        "any",
        "seeds are ignored, or at best cannot be reproduced by another library",
        "noise as an input, drawn by the runtime",
        "onnx-tensorrt operator documentation; equal seeds mean equal text",
    ),
    absent(_RANDOM),
)
OPERATOR_RULES.add(
    Rule(
        "no-scatter-reduction",
        "ScatterND, ScatterElements",
        "a reduction",
        "rejected at parsing",
        "a dense routing matrix and a product",
        BUILT,
    ),
    attribute(("ScatterND", "ScatterElements"), "reduction", "none"),
)


@OPERATOR_RULES.of_operator(
    "TopK",
    Rule(
        "topk-limit",
        "TopK",
        f"a k above {_TOPK_LIMIT}, or one that is computed",
        f'parses, then fails to build ("exceeds {_TOPK_LIMIT}"); a computed k has no profile',
        "a smaller constant k",
        BUILT,
    ),
)
def _topk(view: GraphView, node: onnx.NodeProto) -> str | None:
    count = view.constant(view.operand(node, 1))
    if count is None:
        return "k is not a constant"
    k = int(count.reshape(-1)[0])
    return f"k = {k}" if k > _TOPK_LIMIT else None


OPERATOR_RULES.add(
    Rule(
        "no-trilu",
        "Trilu",
        "any",
        "becomes 19 layers that compare positions",
        "a constant, or one comparison of positions",
        BUILT,
        Severity.NOTE,
    ),
    absent("Trilu"),
)
OPERATOR_RULES.add(
    Rule(
        "wide-normalization",
        "RMSNormalization, LayerNormalization",
        "a stash_type other than float32",
        "the mean square is taken in that type, and squares overflow float16 at 256",
        "stash_type 1",
        BUILT,
    ),
    attribute(("RMSNormalization", "LayerNormalization"), "stash_type", _FLOAT),
)


@OPERATOR_RULES.of_operator(
    _EXPONENTIALS,
    Rule(
        "wide-exponentials",
        ", ".join(_EXPONENTIALS),
        "half precision",
        "e^x overflows float16 above 11, and this model's dt biases reach 33.5; a bundle "
        "promises float32 for scan and softmax",
        "a cast to float32 before",
        "NVIDIA/TensorRT-Model-Connect, Nemotron-H; the published model",
    ),
)
def _half(view: GraphView, node: onnx.NodeProto) -> str | None:
    dtype = view.dtype(view.operand(node, 0))
    if dtype not in ("float16", "bfloat16"):
        return None
    return f"{node.op_type} in {dtype}"


OPERATOR_RULES.add(
    Rule(
        "reductions-drop-nan",
        "ReduceMax, ReduceMin",
        "the only guard against NaN",
        "TensorRT's drop a NaN that ONNX Runtime passes on",
        "a check of the result",
        "measured by NVIDIA/trt-samples-for-hackathon-cn on 11.1",
        Severity.NOTE,
    ),
    absent(("ReduceMax", "ReduceMin")),
)


_MASK, _PAST_KEY, _PAST_VALUE, _NONPAD = 3, 4, 5, 6
_WIDEST_HEAD = 256
_CACHE_TYPES = ("float32", "float16", "bfloat16")


def _rank(view: GraphView, node: onnx.NodeProto) -> str | None:
    shape = view.shape(view.operand(node, 0))
    if not shape or len(shape) == 4:
        return None
    return f"{node.input[0]} has {len(shape)} axes"


ATTENTION_RULES = Rules()
"""Rules about attention, and about TensorScatter, the update of keys and values in place."""

ATTENTION_RULES.add(
    Rule(
        "attention-causal",
        "Attention",
        "is_causal",
        "aligned to the upper left: with a cache the wrong mask, and no error; beside a mask "
        "it is refused",
        "a boolean mask",
        BUILT,
    ),
    attribute("Attention", "is_causal", 0),
)


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-lengths",
        "Attention",
        "nonpad_kv_seqlen",
        "dropped by the parser; ONNX Runtime honours it, so no comparison with it shows the "
        "difference",
        "a boolean mask",
        f"{BUILT}; NVIDIA/TensorRT-Model-Connect #955, #1035",
    ),
)
def _nonpad(view: GraphView, node: onnx.NodeProto) -> str | None:
    name = view.operand(node, _NONPAD)
    return f"nonpad_kv_seqlen = {name}" if name else None


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-past",
        "Attention",
        "past, present or the products as operands",
        "rejected at parsing",
        "TensorScatter before it",
        f"{BUILT}; NVIDIA/TensorRT #4738",
    ),
)
def _past(view: GraphView, node: onnx.NodeProto) -> str | None:
    names = [
        view.operand(node, _PAST_KEY),
        view.operand(node, _PAST_VALUE),
        *node.output[1:],
    ]
    given = ", ".join(filter(None, names))
    return f"past, present or the products as operands: {given}" if given else None


ATTENTION_RULES.add(
    Rule(
        "attention-softcap",
        "Attention",
        "softcap",
        "rejected at parsing",
        "no cap; this model has none",
        BUILT,
    ),
    attribute("Attention", "softcap", 0.0),
)
ATTENTION_RULES.add(
    Rule(
        "attention-precision",
        "Attention",
        "softmax_precision",
        "rejected at parsing, whatever it asks for",
        "the attribute left out",
        BUILT,
    ),
    attribute("Attention", "softmax_precision", 0),
)


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-mask",
        "Attention",
        "without a mask",
        "unused places of a cache would be attended",
        "a boolean mask",
        "this project's dialect",
    ),
)
def _no_mask(view: GraphView, node: onnx.NodeProto) -> str | None:
    masked = view.operand(node, _MASK) or view.attribute(node, "is_causal", 0)
    return None if masked else "no mask"


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-mask-type",
        "Attention",
        "an added mask",
        "the least float32 becomes -inf in float16, and a row without places NaN",
        "a boolean mask, true where attention may go",
        "NvInfer.h, IAttention",
    ),
)
def _mask_type(view: GraphView, node: onnx.NodeProto) -> str | None:
    name = view.operand(node, _MASK)
    dtype = view.dtype(name) if name else "bool"
    if dtype in ("bool", UNKNOWN):
        return None
    return f"a mask of {dtype}"


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-types",
        "Attention",
        "query, key and value of different types",
        "parses, then fails to build",
        "casts before it",
        BUILT,
    ),
)
def _operand_types(view: GraphView, node: onnx.NodeProto) -> str | None:
    dtypes = [view.dtype(view.operand(node, i)) for i in range(3)]
    if len(set(dtypes) - {UNKNOWN}) <= 1:
        return None
    return f"query, key, value: {', '.join(dtypes)}"


ATTENTION_RULES.add(
    Rule(
        "attention-rank",
        "Attention",
        "operands without an axis for heads",
        "reshapes are put around it: 12 layers for 8",
        "[B, heads, length, size]",
        BUILT,
        Severity.NOTE,
    ),
    each("Attention", _rank),
)


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-head-size",
        "Attention",
        f"heads wider than {_WIDEST_HEAD} in half precision",
        "no fused kernel: the build fails",
        "narrower heads",
        BUILT,
    ),
)
def _head_size(view: GraphView, node: onnx.NodeProto) -> str | None:
    query = view.operand(node, 0)
    if view.dtype(query) == "float32":  # taken apart by the builder: no kernel to lose
        return None
    shape = view.shape(query)
    size = shape[3] if shape and len(shape) == 4 else None
    if isinstance(size, int) and size > _WIDEST_HEAD:
        return f"heads of {size}"
    return None


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-scale",
        "Attention",
        "the scale left out",
        "arithmetic on shapes is built in: 18 layers for 8",
        "scale as a number",
        BUILT,
        Severity.NOTE,
    ),
)
def _default_scale(view: GraphView, node: onnx.NodeProto) -> str | None:
    return "no scale" if view.attribute(node, "scale") is None else None


@ATTENTION_RULES.of_operator(
    "Attention",
    Rule(
        "attention-float32",
        "Attention",
        "float32 where speed matters",
        "no fused kernel; the builder is allowed to take it apart",
        "float16 or bfloat16",
        BUILT,
        Severity.NOTE,
    ),
)
def _float32(view: GraphView, node: onnx.NodeProto) -> str | None:
    if view.dtype(view.operand(node, 0)) != "float32":
        return None
    return "computed in float32"


ATTENTION_RULES.add(
    Rule(
        "cache-mode",
        "TensorScatter",
        "circular mode",
        "rejected at parsing",
        'mode "linear"',
        BUILT,
    ),
    attribute("TensorScatter", "mode", "linear"),
)
ATTENTION_RULES.add(
    Rule(
        "cache-axis",
        "TensorScatter",
        "an axis other than -2",
        "rejected at parsing",
        "[B, heads, length, size]",
        BUILT,
    ),
    attribute("TensorScatter", "axis", -2, 2),
)
ATTENTION_RULES.add(
    Rule(
        "cache-rank",
        "TensorScatter",
        "a cache without four axes",
        "rejected at parsing",
        "[B, heads, length, size]",
        BUILT,
    ),
    each("TensorScatter", _rank),
)


@ATTENTION_RULES.of_operator(
    "TensorScatter",
    Rule(
        "cache-length",
        "TensorScatter",
        "a dynamic length",
        'rejected at parsing: "must have a static sequence length dimension"',
        "a capacity fixed before the build",
        BUILT,
        built_only=True,
    ),
)
def _cache_length(view: GraphView, node: onnx.NodeProto) -> str | None:
    shape = view.shape(view.operand(node, 0))
    if shape is None or len(shape) != 4 or isinstance(shape[2], int):
        return None
    return f"a cache of dynamic length {shape[2]}"


@ATTENTION_RULES.of_operator(
    "TensorScatter",
    Rule(
        "cache-is-input",
        "TensorScatter",
        "a cache that was computed",
        "fails to build: the update happens in the input's memory",
        "the input itself",
        BUILT,
    ),
)
def _cache_input(view: GraphView, node: onnx.NodeProto) -> str | None:
    cache = node.input[0]
    if cache in view.inputs:
        return None
    return f"cache {cache} is no input of the graph"


@ATTENTION_RULES.of_operator(
    "TensorScatter",
    Rule(
        "cache-is-output",
        "TensorScatter",
        "a result that stays inside",
        "fails to build, also when Attention alone reads it",
        "an output of the graph",
        BUILT,
    ),
)
def _cache_output(view: GraphView, node: onnx.NodeProto) -> str | None:
    result = node.output[0]
    if result in view.outputs:
        return None
    return f"result {result} is no output of the graph"


@ATTENTION_RULES.of_operator(
    "TensorScatter",
    Rule(
        "cache-readers",
        "TensorScatter",
        "a cache that something else reads too",
        "a second update fails to build; another reader builds, and nothing says whether it "
        "sees the values before or after",
        "the result of the update",
        BUILT,
    ),
)
def _cache_readers(view: GraphView, node: onnx.NodeProto) -> str | None:
    cache = node.input[0]
    readers = [n for n in view.readers[cache] if n.op_type not in ("Shape", "Size")]
    others = [where(n) for n in readers if n is not node]
    if not others:
        return None
    return f"cache {cache} is also read by {', '.join(others)}"


@ATTENTION_RULES.of_operator(
    "TensorScatter",
    Rule(
        "cache-types",
        "TensorScatter",
        f"an update of another type, or a cache that is none of {', '.join(_CACHE_TYPES)}",
        "rejected at parsing",
        "one of these types for both",
        BUILT,
    ),
)
def _cache_type(view: GraphView, node: onnx.NodeProto) -> str | None:
    cache, update = view.dtype(node.input[0]), view.dtype(node.input[1])
    if UNKNOWN in (cache, update) or (cache == update and cache in _CACHE_TYPES):
        return None
    return f"cache of {cache}, update of {update}"


@ATTENTION_RULES.of_operator(
    "TensorScatter",
    Rule(
        "cache-indices",
        "TensorScatter",
        "write indices left out",
        "builds, and writes every update to place 0",
        "write indices of shape (B,)",
        BUILT,
    ),
)
def _write_indices(view: GraphView, node: onnx.NodeProto) -> str | None:
    return None if view.operand(node, 2) else "no write indices"


_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_BOTH = (_QUANTIZE, _DEQUANTIZE)
_SCALE, _ZERO = 1, 2
_NARROW = ("int8", "int4", "float8e4m3fn", "float4e2m1")
_FLOATS = _NARROW[1:]  # int8 is also a type to compute with
_CARRIES = (
    *("Concat", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Shape", "Identity"),
)


def _read_by_others(view: GraphView, name: str, allowed: tuple[str, ...]) -> Iterator[Complaint]:
    """A quantized value, where operators other than some of ONNX and TensorRT's own read it."""
    readers = sorted({node.op_type for node in view.readers.get(name, ())})
    wrong = [kind for kind in readers if kind not in allowed and not kind.startswith("TRT_")]
    if wrong:
        yield name, f"{view.dtype(name)}, read by {', '.join(wrong)}"


QUANTIZATION_RULES = Rules()
"""Rules about quantization, in forms that TensorRT reads."""


@QUANTIZATION_RULES.of_operator(
    _BOTH,
    Rule(
        "quantized-type",
        ", ".join(_BOTH),
        f"a type other than {', '.join(_NARROW)}",
        "rejected; but uint8, ONNX's choice where neither zero point nor output_dtype is "
        "given, becomes int8 without an error",
        "a zero point of the type, or output_dtype",
        BUILT,
    ),
)
def _type(view: GraphView, node: onnx.NodeProto) -> str | None:
    """The type of the quantized side: uint8 without zero point or output_dtype, says ONNX."""
    if node.op_type == _DEQUANTIZE:
        dtype = view.dtype(view.operand(node, 0))
    elif zero := view.operand(node, _ZERO):
        dtype = view.dtype(zero)
    else:
        dtype = type_name(view.attribute(node, "output_dtype", 0))
        if dtype == UNKNOWN:
            dtype = "uint8, because neither zero point nor output_dtype is given"
    if dtype in (*_NARROW, UNKNOWN):
        return None
    return f"quantized as {dtype}"


@QUANTIZATION_RULES.of_operator(
    _BOTH,
    Rule(
        "quantized-symmetric",
        ", ".join(_BOTH),
        "a zero point other than zero",
        "rejected at parsing",
        "symmetric scales",
        BUILT,
    ),
)
def _zero_point(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, _ZERO))
    if value is None or not np.any(value.astype(np.float32)):
        return None
    return "a zero point that is not zero"


@QUANTIZATION_RULES.of_operator(
    _BOTH,
    Rule(
        "quantized-scale",
        ", ".join(_BOTH),
        "a constant scale that is not positive and finite",
        'rejected at parsing: "must all be positive"',
        "a positive scale, also for a channel of zeros",
        BUILT,
    ),
)
def _scale(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, _SCALE))
    if value is None:
        return None
    wide = value.astype(np.float32).reshape(-1)
    if np.all(wide > 0) and np.all(np.isfinite(wide)):
        return None
    return f"a scale of {wide[np.argmin(wide)]:g}"


@QUANTIZATION_RULES.of_operator(
    _BOTH,
    Rule(
        "quantized-blocks",
        ", ".join(_BOTH),
        "a block_size that does not divide its axis",
        'rejected at parsing: "must divide into whole blocks"; ONNX allows a shorter last block',
        "a block size that divides, or padding",
        BUILT,
    ),
)
def _blocks(view: GraphView, node: onnx.NodeProto) -> str | None:
    block, axis = view.attribute(node, "block_size", 0), view.attribute(node, "axis", 1)
    shape = view.shape(view.operand(node, 0))
    if not block or not shape or not -len(shape) <= axis < len(shape):
        return None
    size = shape[axis]
    if isinstance(size, int) and size % block:
        return f"{size} in blocks of {block}"
    return None


@QUANTIZATION_RULES.of_graph(
    Rule(
        "quantized-weights",
        f"weights in {', '.join(_NARROW)}",
        "read by an operator other than DequantizeLinear",
        "fails to build, a Transpose or Gather of the stored weight too",
        "DequantizeLinear first",
        BUILT,
    )
)
def _stored(view: GraphView) -> Iterator[Complaint]:
    for name in view.initializers:
        if view.dtype(name) in _NARROW:
            yield from _read_by_others(view, name, _BOTH)


@QUANTIZATION_RULES.of_graph(
    Rule(
        "quantized-values",
        f"values in {', '.join(_FLOATS)}",
        "read by arithmetic or a Cast",
        "fails to build",
        "DequantizeLinear first",
        BUILT,
    )
)
def _read(view: GraphView) -> Iterator[Complaint]:
    for name in view.readers:
        if name not in view.initializers and view.dtype(name) in _FLOATS:
            yield from _read_by_others(view, name, (*_BOTH, *_CARRIES))
