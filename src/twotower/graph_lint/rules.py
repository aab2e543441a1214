"""The rules, each with what finds the places where it does not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from twotower.graph_lint.rule import BUILT, Complaint, Rule, Rules, Severity, where
from twotower.graph_lint.view import UNKNOWN, GraphView

_NEWEST_OPSET = 24
OPERATORS = (
    "Add",
    "And",
    "ArgMax",
    "Attention",
    "Cast",
    "Clip",
    "Concat",
    "Cos",
    "DequantizeLinear",
    "Div",
    "Equal",
    "Exp",
    "Expand",
    "Gather",
    "GatherElements",
    "GatherND",
    "Gemm",
    "Greater",
    "GreaterOrEqual",
    "Identity",
    "Less",
    "LessOrEqual",
    "Log",
    "MatMul",
    "Max",
    "Min",
    "Mul",
    "Or",
    "QuantizeLinear",
    "RMSNormalization",
    "Range",
    "ReduceSum",
    "Relu",
    "Reshape",
    "Shape",
    "Sigmoid",
    "Sin",
    "Slice",
    "Softmax",
    "Softplus",
    "Split",
    "Squeeze",
    "Sub",
    "Sum",
    "TensorScatter",
    "TopK",
    "Transpose",
    "Unsqueeze",
    "Where",
)
"""What the recorder of graphs and the builders write."""

_DATA_DEPENDENT = "the size of its result depends on values: no CUDA graph can hold it"
_BODY = "values that grow in it fail to build; take the chunk form, or a loop of the runtime"
_RANDOM = "its seed is ignored, or no other library repeats it; take noise as an input"
_TEMPTING: Mapping[str, str] = {
    "CumSum": "several are miscompiled without an error; multiply by a triangular matrix",
    "NonZero": _DATA_DEPENDENT,
    "Compress": _DATA_DEPENDENT,
    "If": _BODY,
    "Loop": _BODY,
    "Scan": _BODY,
    "RandomNormalLike": _RANDOM,
    "RandomUniformLike": _RANDOM,
    "ReduceMax": "TensorRT's drops a NaN that ONNX Runtime passes on",
    "Trilu": "becomes 19 layers; compare positions once",
}
"""Operators that come to mind, and why they are not among `OPERATORS`."""

_WIDE = ("Exp", "Softplus", "Softmax")
_HALF = ("float16", "bfloat16")
_LARGEST_FLOAT16 = 65504.0
_WIDEST_HEAD = 256
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_FEW_BITS = (
    "int4",
    "float8e4m3fn",
    "float4e2m1",
)
_TYPES = (
    "float32",
    *_HALF,
    "int64",
    "int32",
    "bool",
    "int8",
    *_FEW_BITS,
)
_MOVES = (
    "Concat",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Shape",
    "Identity",
)

_ALIKE: Mapping[tuple[int, ...], tuple[str, ...]] = {
    (0, 1): (
        "Add",
        "Sub",
        "Mul",
        "Div",
        "MatMul",
        "RMSNormalization",
        "TensorScatter",
        "Equal",
        "Less",
        "LessOrEqual",
        "Greater",
        "GreaterOrEqual",
    ),
    (0, 1, 2): (
        "Attention",
        "Clip",
        "Gemm",
        "Range",
    ),
    (1, 2): ("Where",),
    (): (
        "Concat",
        "Max",
        "Min",
        "Sum",
    ),
}
"""Operands that must have one type, and of which operators; none named for all."""

_SHAPES: Mapping[tuple[int, ...], tuple[str, ...]] = {
    (1,): (
        "Expand",
        "ReduceSum",
        "Reshape",
        "Split",
        "Squeeze",
        "TopK",
        "Unsqueeze",
    ),
    (0, 1, 2): ("Range",),
    (1, 2, 3, 4): ("Slice",),
}
"""Operands that decide a shape, and of which operators."""

RULES = Rules()
"""Every rule, and what finds its places."""


@RULES.of_graph(
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


@RULES.of_graph(
    Rule(
        "refused-operators",
        f"{', '.join(_TEMPTING)}; a domain of its own",
        "any",
        "; ".join(f"{op_type}: {why}" for op_type, why in _TEMPTING.items())
        + "; TensorRT matches by name alone, whatever the domain",
        "operators of the default domain",
        f"{BUILT}; NVIDIA/TensorRT #4551, #4513; onnx/onnx-tensorrt #1034; "
        "NVIDIA/trt-samples-for-hackathon-cn",
    )
)
def _refused(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield where(node), f"operator {node.domain}::{node.op_type}"
        elif node.op_type in _TEMPTING:
            yield where(node), f"operator {node.op_type} ({_TEMPTING[node.op_type]})"


@RULES.of_graph(
    Rule(
        "known-operators",
        "every operator",
        f"any but {', '.join(OPERATORS)}",
        "these rules know nothing of it, and nobody has tried it here with TensorRT",
        "these operators",
        "what the recorder writes",
        Severity.NOTE,
    )
)
def _unknown(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type not in OPERATORS and node.op_type not in _TEMPTING:
            yield where(node), f"operator {node.op_type}"


@RULES.of_operators(
    ("RMSNormalization",),
    Rule(
        "wide-normalization",
        "RMSNormalization",
        "a stash_type other than float32",
        "the mean square is taken in that type, and squares overflow float16 at 256",
        "stash_type 1",
        BUILT,
    ),
)
def _stash(view: GraphView, node: onnx.NodeProto) -> str | None:
    stash = view.attribute(node, "stash_type", onnx.TensorProto.FLOAT)
    if stash == onnx.TensorProto.FLOAT:
        return None
    return f"stash_type = {stash}"


@RULES.of_operators(
    _WIDE,
    Rule(
        "wide-exponentials",
        ", ".join(_WIDE),
        "half precision",
        "e^x overflows float16 above 11, and this model's dt biases reach 33.5; a bundle "
        "promises float32 for scan and softmax",
        "a cast to float32 before",
        "NVIDIA/TensorRT-Model-Connect, Nemotron-H; the published model",
    ),
)
def _half(view: GraphView, node: onnx.NodeProto) -> str | None:
    dtype = view.dtype(view.operand(node, 0))
    if dtype not in _HALF:
        return None
    return f"{node.op_type} in {dtype}"


@RULES.of_operators(
    ("Attention",),
    Rule(
        "attention-causal",
        "Attention",
        "is_causal",
        "aligned to the upper left: with a cache the wrong mask, and no error; beside a mask "
        "it is refused",
        "a boolean mask",
        BUILT,
    ),
)
def _causal(view: GraphView, node: onnx.NodeProto) -> str | None:
    return "is_causal = 1" if view.attribute(node, "is_causal") else None


@RULES.of_operators(
    ("Attention",),
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
def _lengths(view: GraphView, node: onnx.NodeProto) -> str | None:
    name = view.operand(node, 6)
    return f"nonpad_kv_seqlen = {name}" if name else None


@RULES.of_operators(
    ("Attention",),
    Rule(
        "attention-mask",
        "Attention",
        "without a mask",
        "unused places of a cache would be attended",
        "a boolean mask",
        "this project's dialect",
    ),
)
def _mask(view: GraphView, node: onnx.NodeProto) -> str | None:
    return None if view.operand(node, 3) else "no mask"


@RULES.of_operators(
    ("Attention",),
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
    name = view.operand(node, 3)
    dtype = view.dtype(name) if name else "bool"
    if dtype == "bool":
        return None
    return f"a mask of {dtype}"


@RULES.of_operators(
    ("Attention",),
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
    size = sum(view.shape(query)[3:])
    # In float32 the builder takes it apart: there is no kernel to lose.
    if view.dtype(query) == "float32" or size <= _WIDEST_HEAD:
        return None
    return f"heads of {size}"


@RULES.of_operators(
    ("Attention",),
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


@RULES.of_operators(
    ("TensorScatter",),
    Rule(
        "cache-in-place",
        "TensorScatter",
        "a cache that is computed, or a result that stays inside",
        "fails to build: the update happens in the input's memory",
        "an input of the graph that becomes an output",
        BUILT,
    ),
)
def _in_place(view: GraphView, node: onnx.NodeProto) -> str | None:
    cache, result = view.operand(node, 0), node.output[0]
    if cache not in view.inputs:
        return f"cache {cache} is no input of the graph"
    if result in view.outputs:
        return None
    return f"result {result} is no output of the graph"


@RULES.of_operators(
    ("TensorScatter",),
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
    cache = view.operand(node, 0)
    readers = [n for n in view.readers[cache] if n.op_type != "Shape" and n is not node]
    if not readers:
        return None
    return f"cache {cache} is also read by {', '.join(map(where, readers))}"


@RULES.of_operators(
    ("TensorScatter",),
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


@RULES.of_operators(
    _QUANTIZERS,
    Rule(
        "quantized-scale",
        ", ".join(_QUANTIZERS),
        "a constant scale that is not positive and finite",
        'rejected at parsing: "must all be positive"',
        "a positive scale, also for a channel of zeros",
        BUILT,
    ),
)
def _scale(view: GraphView, node: onnx.NodeProto) -> str | None:
    value = view.constant(view.operand(node, 1))
    if value is None:
        return None
    wide = value.astype(np.float32)
    if np.all(wide > 0) and np.all(np.isfinite(wide)):
        return None
    return f"a scale of {wide.min():g}"


@RULES.of_operators(
    _QUANTIZERS,
    Rule(
        "quantized-blocks",
        ", ".join(_QUANTIZERS),
        "a block_size that does not divide its axis",
        'rejected at parsing: "must divide into whole blocks"; ONNX allows a shorter last block',
        "a block size that divides, or padding",
        BUILT,
    ),
)
def _blocks(view: GraphView, node: onnx.NodeProto) -> str | None:
    block, axis = view.attribute(node, "block_size", 0), view.attribute(node, "axis", 1)
    shape = view.shape(view.operand(node, 0))
    if not block or not -len(shape) <= axis < len(shape) or shape[axis] % block == 0:
        return None
    return f"{shape[axis]} in blocks of {block}"


@RULES.of_graph(
    Rule(
        "quantized-values",
        f"values in {', '.join(_FEW_BITS)}; weights in int8, too",
        "read by arithmetic, a Cast or, of weights, anything but DequantizeLinear",
        "fails to build, a Transpose or Gather of the stored weight too",
        "DequantizeLinear first",
        BUILT,
    )
)
def _narrow(view: GraphView) -> Iterator[Complaint]:
    for name, readers in view.readers.items():
        stored, dtype = name in view.initializers, view.dtype(name)
        if dtype in _FEW_BITS or (stored and dtype == "int8"):
            allowed = _QUANTIZERS if stored else (*_QUANTIZERS, *_MOVES)
            wrong = sorted({node.op_type for node in readers} - set(allowed))
            if wrong:
                yield name, f"{dtype}, read by {', '.join(wrong)}"


@RULES.of_graph(
    Rule(
        "one-type",
        "operands",
        "different types in one operator",
        "refused; but those of RMSNormalization are converted silently",
        "a Cast",
        BUILT,
    )
)
def _mixed(view: GraphView) -> Iterator[Complaint]:
    operands = {kind: indices for indices, kinds in _ALIKE.items() for kind in kinds}
    for node in view.nodes:
        if node.op_type not in operands:
            continue
        indices = operands[node.op_type] or range(len(node.input))
        names = [view.operand(node, index) for index in indices]
        dtypes = [view.dtype(name) for name in names if name]
        if len(set(dtypes) - {UNKNOWN}) > 1:
            yield where(node), f"{node.op_type}({', '.join(dtypes)})"


@RULES.of_graph(
    Rule(
        "known-types",
        "all values",
        f"other types than {', '.join(_TYPES)}, or one that ONNX cannot infer",
        "float64 is narrowed to float32 silently and uint8, QuantizeLinear's choice where neither "
        "zero point nor output_dtype is given, to int8; others are rejected; no rule sees what is "
        "unknown",
        "float32, int64; operands that fit; output_dtype",
        BUILT,
    )
)
def _known_types(view: GraphView) -> Iterator[Complaint]:
    used = {name for node in view.nodes for name in (*node.input, *node.output) if name}
    for name in sorted(used | view.inputs | view.outputs):
        dtype = view.dtype(name)
        if dtype not in _TYPES:
            yield name, dtype


@RULES.of_graph(
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
        value = view.constant(name) if view.dtype(name) in _HALF else None
        if value is not None and np.isinf(value.astype(np.float32)).any():
            yield name, f"an infinite {view.dtype(name)}"
    for node in view.nodes:
        if node.op_type != "Cast" or view.attribute(node, "to") != onnx.TensorProto.FLOAT16:
            continue
        value = view.constant(view.operand(node, 0))
        if value is not None and (np.abs(value.astype(np.float64)) > _LARGEST_FLOAT16).any():
            yield where(node), f"a cast of {np.abs(value).max():.3g} to float16"


@RULES.of_graph(
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
    for name, declared in view.declared.items():
        computed = view.dtype(name)
        if computed not in (declared, UNKNOWN):
            yield name, f"declared {declared}, computed in {computed}"


@RULES.of_graph(
    Rule(
        "inputs-are-read",
        "inputs",
        "unread or, once axes are fixed, read for their shape alone",
        "the parser drops them with one warning; whoever binds them believes they count",
        "no such input",
        BUILT,
    )
)
def _unread(view: GraphView) -> Iterator[Complaint]:
    for name in sorted(view.inputs):
        readers = {node.op_type for node in view.readers.get(name, ())}
        if not readers:
            yield name, "no operator reads this input"
        elif view.fixed and readers == {"Shape"}:
            yield name, "only the shape of this input is read, which is constant"


@RULES.of_graph(
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
            name = view.operand(node, index)
            if name in view.data_dependent:
                yield where(node), f"{node.op_type} takes its shape from the values in {name}"
