"""For every rule of the graph lint a small model with just that fault, and one without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

__all__ = ["ALSO", "FAULTS", "LEGITIMATE"]

OPSET = 24
node = helper.make_node


def value(name: str, dtype: int, shape: Sequence[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def values(text: str | Sequence[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
    """Those of a text, each as `name:TYPE[4,rows]`."""
    if not isinstance(text, str):
        return list(text)
    out = []
    for name, dtype, dims in re.findall(r"(\w+):(\w+)\[([^]]*)\]", text):
        shape = [int(d) if d.isdigit() else d for d in dims.split(",") if d]
        out.append(value(name, T.DataType.Value(dtype), shape))
    return out


def constant(name: str, data: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(data), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: str | Sequence[onnx.ValueInfoProto],
    outputs: str | Sequence[onnx.ValueInfoProto],
    *,
    weights: Sequence[onnx.TensorProto] = (),
    domains: Sequence[str] = (),
    opset: int = OPSET,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes), "planted", values(inputs), values(outputs), list(weights)
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=12)


def one(
    op_type: str,
    *,
    dtype: int = T.FLOAT,
    out: int | None = None,
    shape: Any = (4, 64),
    out_shape: Any = None,
    **attributes: Any,
) -> Any:
    """x -> one operator -> y."""
    given, made = value("x", dtype, shape), value("y", out or dtype, out_shape or shape)
    return model([node(op_type, ["x"], ["y"], **attributes)], [given], [made])


def two(op_type: str, dtypes: tuple[int, int], *, out: int | None = None, **attributes: Any) -> Any:
    """x, z -> one operator -> y."""
    given = [value("x", dtypes[0], [4, 4]), value("z", dtypes[1], [4, 4])]
    return model(
        [node(op_type, ["x", "z"], ["y"], **attributes)],
        given,
        [value("y", out or dtypes[0], [4, 4])],
    )


# --- operators


def opset(bad: bool) -> onnx.ModelProto:
    made = one("Sigmoid")
    made.opset_import[0].version = OPSET + 1 if bad else OPSET
    return made


def domain(bad: bool) -> onnx.ModelProto:
    made = two("Add", (T.FLOAT, T.FLOAT))
    if bad:
        made.graph.node[0].domain = "com.acme"
        made.opset_import.append(helper.make_opsetid("com.acme", 1))
    return made


def function(bad: bool) -> onnx.ModelProto:
    made = one("Sigmoid")
    if bad:
        nodes, opsets = [node("Sigmoid", ["a"], ["b"])], [helper.make_opsetid("", OPSET)]
        made.functions.append(helper.make_function("local", "Same", ["a"], ["b"], nodes, opsets))
    return made


def cumsum(bad: bool) -> onnx.ModelProto:
    weights = [constant("w", np.int64(1) if bad else np.tri(64, dtype=np.float32).T)]
    nodes = [node("CumSum" if bad else "MatMul", ["x", "w"], ["y"])]
    return model(nodes, "x:FLOAT[4,64]", "y:FLOAT[4,64]", weights=weights)


def data_dependent(bad: bool) -> onnx.ModelProto:
    if bad:
        return one("NonZero", out=T.INT64, out_shape=[2, "n"])
    return one("Cast", out=T.INT64, to=T.INT64)


def loop(bad: bool) -> onnx.ModelProto:
    if not bad:
        return one("Sigmoid", shape=(4,))
    carried = "i:INT64[] go:BOOL[] s:FLOAT[a]"
    nodes = [node("Identity", ["go"], ["go_on"]), node("Concat", ["s", "s"], ["longer"], axis=0)]
    made = values("go_on:BOOL[] longer:FLOAT[b]")
    body = helper.make_graph(nodes, "body", values(carried), made)
    weights = [constant("n", np.int64(3)), constant("t", np.array(True))]
    nodes = [node("Loop", ["n", "t", "x"], ["y"], body=body)]
    return model(nodes, "x:FLOAT[4]", "y:FLOAT[c]", weights=weights)


def scatter(bad: bool) -> onnx.ModelProto:
    given = "x:FLOAT[4,64] u:FLOAT[1,64]"
    nodes = [node("ScatterND", ["x", "i", "u"], ["y"], reduction="add" if bad else "none")]
    return model(nodes, given, "y:FLOAT[4,64]", weights=[constant("i", np.array([[1]], np.int64))])


def topk(bad: bool) -> onnx.ModelProto:
    k = 3841 if bad else 3840
    made = f"y:FLOAT[2,{k}] i:INT64[2,{k}]"
    nodes = [node("TopK", ["x", "k"], ["y", "i"])]
    return model(nodes, "x:FLOAT[2,8192]", made, weights=[constant("k", np.array([k], np.int64))])


def stash(bad: bool) -> onnx.ModelProto:
    kind = T.FLOAT16 if bad else T.FLOAT
    nodes = [node("RMSNormalization", ["x", "s"], ["y"], stash_type=kind)]
    return model(
        nodes, "x:FLOAT[4,64]", "y:FLOAT[4,64]", weights=[constant("s", np.ones(64, np.float32))]
    )


# --- attention and its cache


def attention(
    dtype: int = T.FLOAT16,
    *,
    mask: int | None = T.BOOL,
    key: int | None = None,
    size: int = 16,
    nonpad: bool = False,
    **more: Any,
) -> Any:
    """Two heads, 4 queries, 8 keys."""
    key = key or dtype
    given = [
        value("q", dtype, [1, 2, 4, size]),
        value("k", key, [1, 2, 8, size]),
        value("v", key, [1, 2, 8, size]),
    ]
    names = ["q", "k", "v", "m" if mask else ""]
    given += [value("m", mask, [1, 1, 4, 8])] if mask else []
    if nonpad:
        given.append(value("n", T.INT64, [1]))
        names += ["", "", "n"]
    attributes = {k: v for k, v in {"scale": 0.25, **more}.items() if v is not None}
    return model(
        [node("Attention", names, ["y"], **attributes)], given, [value("y", dtype, [1, 2, 4, size])]
    )


def attention_past(bad: bool) -> onnx.ModelProto:
    made = attention()
    if bad:
        made.graph.node[0].input.extend(["pk", "pv"])
        made.graph.node[0].output.extend(["k_out", "v_out"])
        made.graph.input.extend(values("pk:FLOAT16[1,2,3,16] pv:FLOAT16[1,2,3,16]"))
        made.graph.output.extend(values("k_out:FLOAT16[1,2,11,16] v_out:FLOAT16[1,2,11,16]"))
        made.graph.input[3].CopyFrom(value("m", T.BOOL, [1, 1, 4, 11]))
    return made


def attention_rank(bad: bool) -> onnx.ModelProto:
    if not bad:
        return attention()
    given = "q:FLOAT16[1,4,32] k:FLOAT16[1,8,32] v:FLOAT16[1,8,32] m:BOOL[1,1,4,8]"
    nodes = [
        node("Attention", ["q", "k", "v", "m"], ["y"], scale=0.25, q_num_heads=2, kv_num_heads=2)
    ]
    return model(nodes, given, "y:FLOAT16[1,4,32]")


def cache(
    dtype: int = T.FLOAT16,
    *,
    update: int | None = None,
    shape: Sequence[Any] = (2, 2, 64, 16),
    rows: Any = 4,
    indices: bool = True,
    **more: Any,
) -> Any:
    """Keys of 4 tokens written into a cache of 64."""
    axis = more.get("axis", -2) % len(shape)
    part = [rows if i == axis else size for i, size in enumerate(shape)]
    given = [
        value("c", dtype, shape),
        value("u", update or dtype, part),
        *([value("w", T.INT64, [shape[0]])] if indices else []),
    ]
    nodes = [node("TensorScatter", ["c", "u", *(["w"] if indices else [])], ["y"], **more)]
    return model(nodes, given, [value("y", dtype, shape)])


def cache_is_input(bad: bool) -> onnx.ModelProto:
    made = cache()
    if bad:
        made.graph.node[0].input[0] = "negated"
        made.graph.node.insert(0, node("Neg", ["c"], ["negated"]))
    return made


def cache_is_output(bad: bool) -> onnx.ModelProto:
    made = cache()
    made.graph.node.append(node("Neg", ["y"], ["z"]))
    made.graph.output.append(value("z", T.FLOAT16, [2, 2, 64, 16]))
    if bad:
        del made.graph.output[0]
    return made


def cache_readers(bad: bool) -> onnx.ModelProto:
    made = cache()
    if bad:
        made.graph.node.append(node("TensorScatter", ["c", "u", "w"], ["z"]))
        made.graph.output.append(value("z", T.FLOAT16, [2, 2, 64, 16]))
    return made


# --- quantization


def quantized(
    zero: onnx.TensorProto | None, *, scale: float = 0.1, **attributes: Any
) -> onnx.ModelProto:
    """x -> quantize -> dequantize -> y."""
    operands = ["s"] if zero is None else ["s", "z"]
    nodes = [
        node("QuantizeLinear", ["x", *operands], ["q"], **attributes),
        node("DequantizeLinear", ["q", *operands], ["y"]),
    ]
    weights = [constant("s", np.float32(scale)), *([] if zero is None else [zero])]
    return model(nodes, "x:FLOAT[8,8]", "y:FLOAT[8,8]", weights=weights)


def int8_zero(number: int = 0) -> onnx.TensorProto:
    return helper.make_tensor("z", T.INT8, [], [number])


def blocks(bad: bool) -> onnx.ModelProto:
    rows = 72 if bad else 64
    weights = [
        helper.make_tensor("w", T.INT4, [rows, 32], bytes(rows * 16), raw=True),
        constant("s", np.full((-(-rows // 16), 32), 0.5, np.float16)),
    ]
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=16),
        node("MatMul", ["x", "d"], ["y"]),
    ]
    return model(nodes, f"x:FLOAT16[4,{rows}]", "y:FLOAT16[4,32]", weights=weights)


def stored(bad: bool) -> onnx.ModelProto:
    """A transposed product with 8-bit weights: the transpose before or after dequantization."""
    weights = [
        helper.make_tensor("w", T.INT8, [8, 8], bytes(range(64)), raw=True),
        constant("s", np.float32(1)),
    ]
    first, second = node("Transpose", ["w"], ["t"]), node("DequantizeLinear", ["t", "s"], ["d"])
    if not bad:
        first, second = node("DequantizeLinear", ["w", "s"], ["t"]), node("Transpose", ["t"], ["d"])
    nodes = [first, second, node("MatMul", ["x", "d"], ["y"])]
    return model(nodes, "x:FLOAT[4,8]", "y:FLOAT[4,8]", weights=weights)


def narrow_value(bad: bool) -> onnx.ModelProto:
    made = quantized(None, output_dtype=T.FLOAT8E4M3FN)
    if bad:
        made.graph.node[1].CopyFrom(node("Cast", ["q"], ["y"], to=T.FLOAT))
    return made


# --- values


def infinite(bad: bool) -> onnx.ModelProto:
    given, number = ("x:FLOAT16[4,64] m:BOOL[4,64]", np.float16(-np.inf if bad else -60000))
    nodes = [node("Where", ["m", "x", "c"], ["y"])]
    return model(nodes, given, "y:FLOAT16[4,64]", weights=[constant("c", number)])


def inferable(bad: bool) -> onnx.ModelProto:
    weights = [constant("w", np.ones((63 if bad else 64, 64), np.float32))]
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Sigmoid", ["m"], ["y"])]
    return model(nodes, "x:FLOAT[4,64]", "y:FLOAT[4,64]", weights=weights)


def declared(bad: bool) -> onnx.ModelProto:
    return two("Add", (T.FLOAT16, T.FLOAT16), out=T.FLOAT if bad else T.FLOAT16)


def unread(bad: bool) -> onnx.ModelProto:
    made = one("Sigmoid")
    if bad:
        made.graph.input.append(value("z", T.FLOAT, [4]))
    return made


def shape_only(bad: bool) -> onnx.ModelProto:
    nodes = [
        node("Shape", ["z"], ["s"]),
        node("Reshape", ["x", "s"], ["r"]),
        *([] if bad else [node("Add", ["r", "z"], ["y"])]),
    ]
    if bad:
        nodes[1].output[0] = "y"
    return model(nodes, "x:FLOAT[4] z:FLOAT[2,2]", "y:FLOAT[2,2]")


def shape_from_value(bad: bool) -> onnx.ModelProto:
    given = "x:FLOAT[4,64] s:" + ("INT64[2]" if bad else "INT64[1,1]")
    nodes = [
        node("Abs", ["s"], ["a"]),
        *([] if bad else [node("Shape", ["a"], ["b"])]),
        node("Expand", ["x", "a" if bad else "b"], ["y"]),
    ]
    return model(nodes, given, "y:FLOAT[n,k]")


def weights_in(dtype: int, *, block: int) -> onnx.ModelProto:
    """A product with a weight [64, 32] quantized in blocks along its first axis."""
    few = dtype in (T.INT4, T.FLOAT4E2M1)
    stored = helper.make_tensor("w", dtype, [64, 32], bytes(64 * 32 // (2 if few else 1)), raw=True)
    scale = helper.make_tensor("s", T.FLOAT16, [64 // block, 32], [0.5] * (2048 // block))
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=block),
        node("MatMul", ["x", "d"], ["y"]),
    ]
    return model(nodes, "x:FLOAT16[4,64]", "y:FLOAT16[4,32]", weights=[stored, scale])


def twice_scaled() -> onnx.ModelProto:
    """NVFP4 weights: blocks of 16 with scales in float8, which have a scale of their own."""
    weights = [
        helper.make_tensor("w", T.FLOAT4E2M1, [32, 64], bytes(1024), raw=True),
        helper.make_tensor("b", T.FLOAT8E4M3FN, [32, 4], bytes([0x38]) * 128, raw=True),
        helper.make_tensor("g", T.FLOAT16, [], [0.5]),
    ]
    nodes = [
        node("DequantizeLinear", ["b", "g"], ["s"]),
        node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=16),
        node("Transpose", ["d"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["y"]),
    ]
    return model(nodes, "x:FLOAT16[4,64]", "y:FLOAT16[4,32]", weights=weights)


def activations_in_four_bits() -> onnx.ModelProto:
    """NVFP4 activations: their scales are computed, which no standard operator says."""
    how = {"domain": "trt", "axis": -1, "block_size": 16, "scale_type": 17}
    nodes = [
        node("TRT_FP4DynamicQuantize", ["x", "g"], ["q", "b"], **how),
        node("DequantizeLinear", ["b", "g"], ["s"]),
        node("DequantizeLinear", ["q", "s"], ["y"], axis=-1, block_size=16),
    ]
    weights = [helper.make_tensor("g", T.FLOAT16, [], [0.5])]
    return model(nodes, "x:FLOAT16[4,64]", "y:FLOAT16[4,64]", weights=weights, domains=["trt"])


def turned_between() -> onnx.ModelProto:
    """Quantized values may change their shape before they are widened."""
    made = quantized(None, output_dtype=T.FLOAT8E4M3FN)
    made.graph.node.insert(1, node("Transpose", ["q"], ["t"], perm=[1, 0]))
    made.graph.node[2].input[0] = "t"
    return made


LEGITIMATE: dict[str, Callable[[], onnx.ModelProto]] = {
    "int8": lambda: quantized(helper.make_tensor("z", T.INT8, [], [0])),
    "float8 by zero point": lambda: quantized(helper.make_tensor("z", T.FLOAT8E4M3FN, [], [0])),
    "float8 by attribute": lambda: quantized(None, output_dtype=T.FLOAT8E4M3FN),
    **{
        T.DataType.Name(t): lambda t=t: weights_in(t, block=16)
        for t in (T.INT8, T.INT4, T.FLOAT8E4M3FN, T.FLOAT4E2M1)
    },
    "NVFP4 weights": twice_scaled,
    "NVFP4 activations": activations_in_four_bits,
    "float8 in another shape": turned_between,
    "uint8 outside": lambda: one("Cast", dtype=T.UINT8, out=T.FLOAT, to=T.FLOAT),
}
"""Few bits as they should be: no rule complains, and they build."""

FAULTS: dict[str, Callable[[bool], onnx.ModelProto]] = {
    "opset": opset,
    "standard-operators": domain,
    "no-functions": function,
    "no-cumsum": cumsum,
    "no-data-dependent-output": data_dependent,
    "no-control-flow": loop,
    "no-plugin-operators": lambda bad: one("CausalConvWithState" if bad else "Sigmoid"),
    "no-absent-operators": lambda bad: two("BitwiseAnd" if bad else "Mod", (T.INT64, T.INT64)),
    "no-randomness": lambda bad: one("RandomUniformLike" if bad else "Sigmoid"),
    "no-scatter-reduction": scatter,
    "topk-limit": topk,
    "no-trilu": lambda bad: one("Trilu" if bad else "Sigmoid", shape=(16, 16)),
    "wide-normalization": stash,
    "wide-exponentials": lambda bad: one("Softplus", dtype=T.FLOAT16 if bad else T.FLOAT),
    "reductions-drop-nan": lambda bad: one("ReduceMax" if bad else "ReduceSum", out_shape=[1, 1]),
    "attention-causal": lambda bad: attention(is_causal=int(bad), mask=None if bad else T.BOOL),
    "attention-lengths": lambda bad: attention(nonpad=bad),
    "attention-past": attention_past,
    "attention-softcap": lambda bad: attention(softcap=5.0 if bad else 0.0),
    "attention-precision": lambda bad: attention(softmax_precision=T.FLOAT if bad else None),
    "attention-mask": lambda bad: attention(mask=None if bad else T.BOOL),
    "attention-mask-type": lambda bad: attention(mask=T.FLOAT16 if bad else T.BOOL),
    "attention-types": lambda bad: attention(key=T.FLOAT if bad else T.FLOAT16),
    "attention-rank": attention_rank,
    "attention-head-size": lambda bad: attention(size=264 if bad else 256),
    "attention-scale": lambda bad: attention(scale=None if bad else 0.25),
    "attention-float32": lambda bad: attention(T.FLOAT if bad else T.FLOAT16),
    "cache-mode": lambda bad: cache(mode="circular" if bad else "linear"),
    "cache-axis": lambda bad: cache(axis=1 if bad else 2),
    "cache-rank": lambda bad: cache(shape=(2, 64, 16) if bad else (2, 2, 64, 16)),
    "cache-length": lambda bad: cache(shape=(2, 2, "T" if bad else 64, 16)),
    "cache-is-input": cache_is_input,
    "cache-is-output": cache_is_output,
    "cache-readers": cache_readers,
    "cache-types": lambda bad: cache(update=T.FLOAT if bad else T.FLOAT16),
    "cache-indices": lambda bad: cache(indices=not bad),
    "quantized-type": lambda bad: quantized(None) if bad else quantized(None, output_dtype=T.INT8),
    "quantized-symmetric": lambda bad: quantized(int8_zero(3 if bad else 0)),
    "quantized-scale": lambda bad: quantized(int8_zero(), scale=0.0 if bad else 0.1),
    "quantized-blocks": blocks,
    "quantized-weights": stored,
    "quantized-values": narrow_value,
    "one-type": lambda bad: two("Mul", (T.FLOAT16, T.FLOAT if bad else T.FLOAT16)),
    "known-types": lambda bad: one("Abs", dtype=T.DOUBLE if bad else T.FLOAT),
    "finite-constants": infinite,
    "inferable": inferable,
    "declared-types": declared,
    "inputs-are-read": unread,
    "inputs-are-values": shape_only,
    "shapes-from-shapes": shape_from_value,
    "named-axes": lambda bad: one("Sigmoid", shape=[None, 4] if bad else ["B", 4]),
}
"""Rule -> the model with the fault (True) or without it (False)."""

ALSO: dict[str, frozenset[str]] = {
    "no-plugin-operators": frozenset(
        {"inferable"}
    )  # opset 24 has no such operator, so ONNX knows nothing of its result
}
"""Rule -> other rules that its fault breaks too, each with its reason."""
