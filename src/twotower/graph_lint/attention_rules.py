"""Rules about Attention and about TensorScatter, the update of keys and values in place."""

from __future__ import annotations

import onnx

from twotower.graph_lint.rule import BUILT, Rule, Severity, each, where
from twotower.graph_lint.view import UNKNOWN, GraphView

__all__ = ["ATTENTION_RULES"]

_MASK, _PAST_KEY, _PAST_VALUE, _NONPAD = 3, 4, 5, 6
_WIDEST_HEAD = 256
_CACHE_TYPES = ("float32", "float16", "bfloat16")


def _causal(view: GraphView, node: onnx.NodeProto) -> str | None:
    return "is_causal = 1" if view.attribute(node, "is_causal", 0) else None


def _nonpad(view: GraphView, node: onnx.NodeProto) -> str | None:
    return f"nonpad_kv_seqlen = {name}" if (name := view.operand(node, _NONPAD)) else None


def _past(view: GraphView, node: onnx.NodeProto) -> str | None:
    names = [view.operand(node, _PAST_KEY), view.operand(node, _PAST_VALUE), *node.output[1:]]
    return (
        f"past, present or the products as operands: {', '.join(filter(None, names))}"
        if any(names)
        else None
    )


def _softcap(view: GraphView, node: onnx.NodeProto) -> str | None:
    return f"softcap = {cap}" if (cap := view.attribute(node, "softcap", 0.0)) else None


def _precision(view: GraphView, node: onnx.NodeProto) -> str | None:
    return (
        f"softmax_precision = {kind}"
        if (kind := view.attribute(node, "softmax_precision", 0))
        else None
    )


def _no_mask(view: GraphView, node: onnx.NodeProto) -> str | None:
    return None if view.operand(node, _MASK) or _causal(view, node) else "no mask"


def _mask_type(view: GraphView, node: onnx.NodeProto) -> str | None:
    name = view.operand(node, _MASK)
    return (
        f"a mask of {dtype}"
        if name and (dtype := view.dtype(name)) not in ("bool", UNKNOWN)
        else None
    )


def _operand_types(view: GraphView, node: onnx.NodeProto) -> str | None:
    dtypes = [view.dtype(view.operand(node, i)) for i in range(3)]
    return f"query, key, value: {', '.join(dtypes)}" if len(set(dtypes) - {UNKNOWN}) > 1 else None


def _head_size(view: GraphView, node: onnx.NodeProto) -> str | None:
    shape = view.shape(view.operand(node, 0))
    size = shape[3] if shape and len(shape) == 4 else None
    taken_apart = (
        view.dtype(view.operand(node, 0)) == "float32"
    )  # the builder may then, and there is no kernel to lose
    return (
        f"heads of {size}"
        if isinstance(size, int) and size > _WIDEST_HEAD and not taken_apart
        else None
    )


def _rank(view: GraphView, node: onnx.NodeProto) -> str | None:
    shape = view.shape(view.operand(node, 0))
    return f"a query of {len(shape)} axes" if shape and len(shape) != 4 else None


def _default_scale(view: GraphView, node: onnx.NodeProto) -> str | None:
    return "no scale" if view.attribute(node, "scale") is None else None


def _float32(view: GraphView, node: onnx.NodeProto) -> str | None:
    return "computed in float32" if view.dtype(view.operand(node, 0)) == "float32" else None


def _circular(view: GraphView, node: onnx.NodeProto) -> str | None:
    return (
        f'mode="{mode}"' if (mode := view.attribute(node, "mode", "linear")) != "linear" else None
    )


def _axis(view: GraphView, node: onnx.NodeProto) -> str | None:
    return f"axis = {axis}" if (axis := view.attribute(node, "axis", -2)) not in (-2, 2) else None


def _cache_rank(view: GraphView, node: onnx.NodeProto) -> str | None:
    shape = view.shape(view.operand(node, 0))
    return f"a cache of {len(shape)} axes" if shape is not None and len(shape) != 4 else None


def _cache_length(view: GraphView, node: onnx.NodeProto) -> str | None:
    shape = view.shape(view.operand(node, 0))
    dynamic = shape is not None and len(shape) == 4 and not isinstance(shape[2], int)
    return f"a cache of dynamic length {shape[2]}" if dynamic and shape is not None else None


def _cache_input(view: GraphView, node: onnx.NodeProto) -> str | None:
    return (
        None if node.input[0] in view.inputs else f"cache {node.input[0]} is no input of the graph"
    )


def _cache_output(view: GraphView, node: onnx.NodeProto) -> str | None:
    return (
        None
        if node.output[0] in view.outputs
        else f"result {node.output[0]} is no output of the graph"
    )


def _cache_readers(view: GraphView, node: onnx.NodeProto) -> str | None:
    others = [
        n
        for n in view.readers[node.input[0]]
        if n is not node and n.op_type not in ("Shape", "Size")
    ]
    return (
        f"cache {node.input[0]} is also read by {', '.join(map(where, others))}" if others else None
    )


def _cache_type(view: GraphView, node: onnx.NodeProto) -> str | None:
    cache, update = view.dtype(node.input[0]), view.dtype(node.input[1])
    bad = cache != update or cache not in _CACHE_TYPES
    return (
        f"cache of {cache}, update of {update}" if bad and UNKNOWN not in (cache, update) else None
    )


def _write_indices(view: GraphView, node: onnx.NodeProto) -> str | None:
    return None if view.operand(node, 2) else "no write indices"


ATTENTION_RULES: tuple[Rule, ...] = (
    Rule("attention-causal", "Attention", "is_causal",
         "aligned to the upper left: with a cache the wrong mask, and no error; beside a mask it is refused", "a boolean mask", BUILT,
         each("Attention", _causal)),
    Rule("attention-lengths", "Attention", "nonpad_kv_seqlen",
         "dropped by the parser; ONNX Runtime honours it, so no comparison with it shows the difference", "a boolean mask",
         f"{BUILT}; NVIDIA/TensorRT-Model-Connect #955, #1035", each("Attention", _nonpad)),
    Rule("attention-past", "Attention", "past, present or the products as operands", "rejected at parsing", "TensorScatter before it",
         f"{BUILT}; NVIDIA/TensorRT #4738", each("Attention", _past)),
    Rule("attention-softcap", "Attention", "softcap", "rejected at parsing", "no cap; this model has none", BUILT,
         each("Attention", _softcap)),
    Rule("attention-precision", "Attention", "softmax_precision", "rejected at parsing, whatever it asks for", "the attribute left out",
         BUILT, each("Attention", _precision)),
    Rule("attention-mask", "Attention", "without a mask", "unused places of a cache would be attended", "a boolean mask",
         "this project's dialect", each("Attention", _no_mask)),
    Rule("attention-mask-type", "Attention", "an added mask", "the least float32 becomes -inf in float16, and a row without places NaN",
         "a boolean mask, true where attention may go", "NvInfer.h, IAttention", each("Attention", _mask_type)),
    Rule("attention-types", "Attention", "query, key and value of different types", "parses, then fails to build", "casts before it", BUILT,
         each("Attention", _operand_types)),
    Rule("attention-rank", "Attention", "operands without an axis for heads", "reshapes are put around it: 12 layers for 8",
         "[B, heads, length, size]", BUILT, each("Attention", _rank), Severity.NOTE),
    Rule("attention-head-size", "Attention", f"heads wider than {_WIDEST_HEAD} in half precision", "no fused kernel: the build fails",
         "narrower heads", BUILT, each("Attention", _head_size)),
    Rule("attention-scale", "Attention", "the scale left out", "arithmetic on shapes is built in: 18 layers for 8", "scale as a number",
         BUILT, each("Attention", _default_scale), Severity.NOTE),
    Rule("attention-float32", "Attention", "float32 where speed matters", "no fused kernel; the builder is allowed to take it apart",
         "float16 or bfloat16", BUILT, each("Attention", _float32), Severity.NOTE),
    Rule("cache-mode", "TensorScatter", "circular mode", "rejected at parsing", 'mode "linear"', BUILT, each("TensorScatter", _circular)),
    Rule("cache-axis", "TensorScatter", "an axis other than -2", "rejected at parsing", "[B, heads, length, size]", BUILT,
         each("TensorScatter", _axis)),
    Rule("cache-rank", "TensorScatter", "a cache without four axes", "rejected at parsing", "[B, heads, length, size]", BUILT,
         each("TensorScatter", _cache_rank)),
    Rule("cache-length", "TensorScatter", "a dynamic length", 'rejected at parsing: "must have a static sequence length dimension"',
         "a capacity fixed before the build", BUILT, each("TensorScatter", _cache_length), built_only=True),
    Rule("cache-is-input", "TensorScatter", "a cache that was computed", "fails to build: the update happens in the input's memory",
         "the input itself", BUILT, each("TensorScatter", _cache_input)),
    Rule("cache-is-output", "TensorScatter", "a result that stays inside", "fails to build, also when Attention alone reads it",
         "an output of the graph", BUILT, each("TensorScatter", _cache_output)),
    Rule("cache-readers", "TensorScatter", "a cache that something else reads too",
         "a second update fails to build; another reader builds, and nothing says whether it sees the values before or after",
         "the result of the update", BUILT, each("TensorScatter", _cache_readers)),
    Rule("cache-types", "TensorScatter", f"an update of another type, or a cache that is none of {', '.join(_CACHE_TYPES)}",
         "rejected at parsing", "one of these types for both", BUILT, each("TensorScatter", _cache_type)),
    Rule("cache-indices", "TensorScatter", "write indices left out", "builds, and writes every update to place 0",
         "write indices of shape (B,)", BUILT, each("TensorScatter", _write_indices)),
)  # fmt: skip
"""Rules about attention and its cache."""
