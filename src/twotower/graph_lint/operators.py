"""Rules about single operators: which must not occur, and with which attributes others must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx

from twotower.graph_lint.rule import Complaint, Rule, Severity
from twotower.graph_lint.view import GraphView

__all__ = ["OPERATOR_RULES"]

_OPSET = 24
_TOPK_LIMIT = 3840
_BUILT = "parsed and built with TensorRT for RTX 1.7.1"
_MANUAL = "onnx-tensorrt, docs/operators.md (11.1)"

_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit")
_CONTROL = ("Loop", "Scan", "If")
_PLUGINS = ("LinearAttention", "CausalConvWithState", "FlexAttention", "SwiGLU")
_ABSENT = (
    "Multinomial", "DynamicQuantizeLinear", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "BitShift", "CumProd", "BitCast",
)  # fmt: skip
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Dropout")


def _named(*names: str) -> Callable[[GraphView], Iterator[Complaint]]:
    """Finds operators by name; their domain does not matter, because TensorRT's parser does not read it either."""

    def find(view: GraphView) -> Iterator[Complaint]:
        for node in view.nodes:
            if node.op_type in names:
                yield _where(node), f"operator {node.op_type}"

    return find


def _where(node: onnx.NodeProto) -> str:
    return node.name or f"{node.op_type} that makes {', '.join(node.output)}"


def _foreign(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield _where(node), f"operator {node.domain}::{node.op_type}"


def _opset(view: GraphView) -> Iterator[Complaint]:
    for entry in view.model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version != _OPSET:
            yield "the model", f"opset {entry.version}"


def _functions(view: GraphView) -> Iterator[Complaint]:
    for function in view.model.functions:
        yield "the model", f"local function {function.domain}::{function.name}"


def _reduction(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type in ("ScatterND", "ScatterElements") and (kind := view.attribute(node, "reduction", "none")) != "none":
            yield _where(node), f'reduction="{kind}"'


def _topk(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type != "TopK":
            continue
        count = view.constant(view.operand(node, 1))
        if count is None:
            yield _where(node), "k is not a constant"
        elif int(count.reshape(-1)[0]) > _TOPK_LIMIT:
            yield _where(node), f"k = {int(count.reshape(-1)[0])}"


def _rms_stash(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type in ("RMSNormalization", "LayerNormalization"):
            kind = view.attribute(node, "stash_type", 1)
            if kind != 1:
                yield _where(node), f"stash_type = {kind}"


def _narrow_exponential(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type in ("Exp", "Softplus", "Softmax", "LogSoftmax", "ReduceLogSumExp"):
            dtype = view.dtype(view.operand(node, 0))
            if dtype in ("float16", "bfloat16"):
                yield _where(node), f"{node.op_type} in {dtype}"


def _extremes(view: GraphView) -> Iterator[Complaint]:
    for node in view.nodes:
        if node.op_type in ("ReduceMax", "ReduceMin"):
            yield _where(node), f"operator {node.op_type}"


OPERATOR_RULES: tuple[Rule, ...] = (
    Rule("opset", "the model", f"an opset other than {_OPSET}", "newer ones are not documented for TensorRT 11; older ones lack TensorScatter",
         f"opset {_OPSET}", "TensorRT 11 operator documentation: 9 to 24", _opset),
    Rule("standard-operators", "every operator", "a domain of its own",
         "ONNX Runtime cannot run it, and TensorRT matches it by name alone, whatever its domain", "operators of the default domain", _BUILT, _foreign),
    Rule("no-functions", "the model", "local functions", "the parser expands them in its own way; what is checked is not what is built",
         "the operators themselves", "this project's dialect", _functions),
    Rule("no-cumsum", "CumSum", "any", "several with different axes or directions are miscompiled: wrong numbers, no error",
         "a product with a constant lower-triangular matrix", "NVIDIA/TensorRT #4551, #4513; onnx/onnx-tensorrt #1034", _named("CumSum")),
    Rule("no-data-dependent-output", ", ".join(_DATA_DEPENDENT), "any", "the size of the result is known only when it runs: no parser plugin, no graph capture",
         "masks over a fixed size", _BUILT, _named(*_DATA_DEPENDENT)),
    Rule("no-control-flow", ", ".join(_CONTROL), "any", "growing values fail to build, and a captured CUDA graph cannot branch on the host",
         "the chunk form of the recurrence; loops in the runtime", _BUILT, _named(*_CONTROL)),
    Rule("no-plugin-operators", ", ".join(_PLUGINS), "any", 'supports_operator() says yes, parsing fails: "failed to load plugin"',
         "MatMul, Conv and elementwise operators", _BUILT, _named(*_PLUGINS)),
    Rule("no-absent-operators", ", ".join(_ABSENT), "any", "the parser rejects them", "arithmetic on int64, Where; noise as an input", _BUILT, _named(*_ABSENT)),
    Rule("no-randomness", ", ".join(_RANDOM), "any", "a seed inside an engine cannot be reproduced on another backend",
         "noise as an input, drawn by the runtime", "this project's contract: equal seeds, equal text", _named(*_RANDOM)),
    Rule("no-scatter-reduction", "ScatterND, ScatterElements", "a reduction", "rejected at parsing", "a dense routing matrix and a product",
         f"{_MANUAL}; {_BUILT}", _reduction),
    Rule("topk-limit", "TopK", f"a k above {_TOPK_LIMIT}, or one that is not constant", f'parses, then fails to build: "exceeds {_TOPK_LIMIT}"',
         "a smaller constant k", f"{_MANUAL}; {_BUILT}", _topk),
    Rule("no-trilu", "Trilu", "any", "becomes 31 layers", "a constant or a comparison of positions", _BUILT, _named("Trilu")),
    Rule("wide-normalization", "RMSNormalization, LayerNormalization", "a stash_type other than float32",
         "squares overflow float16 at 256", "stash_type 1", "the published model computes it in float32", _rms_stash),
    Rule("wide-exponentials", "Exp, Softplus, Softmax, LogSoftmax, ReduceLogSumExp", "half precision",
         "dt biases reach 33.5, whose exponential overflows float16", "a cast to float32 before",
         "NVIDIA/TensorRT-Model-Connect, Nemotron-H; the published model", _narrow_exponential),
    Rule("reductions-drop-nan", "ReduceMax, ReduceMin", "the only guard against NaN", "TensorRT's drop a NaN that ONNX Runtime passes on",
         "a check of the result", "measured by NVIDIA/trt-samples-for-hackathon-cn on 11.1", _extremes, Severity.NOTE),
)  # fmt: skip
"""Rules about operators."""
