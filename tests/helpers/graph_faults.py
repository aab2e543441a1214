"""For every rule of the graph lint a small model with just that fault, and one without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

__all__ = ["FAULTS", "FORMS", "LEGITIMATE"]

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
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes), "planted", values(inputs), values(outputs), list(weights)
    )
    opsets = [helper.make_opsetid("", OPSET)]
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


def data_dependent(bad: bool) -> onnx.ModelProto:
    if bad:
        return one("NonZero", out=T.INT64, out_shape=[2, "n"])
    return one("Sin")


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
    size: int = 16,
    nonpad: bool = False,
    **more: Any,
) -> Any:
    """Two heads, 4 queries, 8 keys."""
    given = [
        value("q", dtype, [1, 2, 4, size]),
        value("k", dtype, [1, 2, 8, size]),
        value("v", dtype, [1, 2, 8, size]),
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


def cache(
    dtype: int = T.FLOAT16,
    *,
    update: int | None = None,
    indices: bool = True,
) -> Any:
    """Keys of 4 tokens written into a cache of 64."""
    shape = [2, 2, 64, 16]
    given = [value("c", dtype, shape), value("u", update or dtype, [2, 2, 4, 16])]
    if indices:
        given.append(value("w", T.INT64, [2]))
    nodes = [node("TensorScatter", [v.name for v in given], ["y"])]
    return model(nodes, given, [value("y", dtype, shape)])


def cache_is_input(bad: bool) -> onnx.ModelProto:
    made = cache()
    if bad:
        made.graph.node[0].input[0] = "negated"
        made.graph.node.insert(0, node("Relu", ["c"], ["negated"]))
    return made


def cache_is_output(bad: bool) -> onnx.ModelProto:
    made = cache()
    made.graph.node.append(node("Relu", ["y"], ["z"]))
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
    given: onnx.TensorProto | None, *, scale: float = 0.1, **attributes: Any
) -> onnx.ModelProto:
    """x -> quantize -> dequantize -> y."""
    operands = ["s"] if given is None else ["s", "z"]
    nodes = [
        node("QuantizeLinear", ["x", *operands], ["q"], **attributes),
        node("DequantizeLinear", ["q", *operands], ["y"]),
    ]
    weights = [constant("s", np.float32(scale)), *([] if given is None else [given])]
    return model(nodes, "x:FLOAT[8,8]", "y:FLOAT[8,8]", weights=weights)


def zero(dtype: int = T.INT8) -> onnx.TensorProto:
    return helper.make_tensor("z", dtype, [], [0])


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
        node("Identity", ["s"], ["a"]),
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


def turned_between() -> onnx.ModelProto:
    """Quantized values may change their shape before they are widened."""
    made = quantized(None, output_dtype=T.FLOAT8E4M3FN)
    made.graph.node.insert(1, node("Transpose", ["q"], ["t"], perm=[1, 0]))
    made.graph.node[2].input[0] = "t"
    return made


LEGITIMATE: dict[str, Callable[[], onnx.ModelProto]] = {
    "int8": lambda: quantized(zero()),
    "float8 by zero point": lambda: quantized(zero(T.FLOAT8E4M3FN)),
    "float8 by attribute": lambda: quantized(None, output_dtype=T.FLOAT8E4M3FN),
    **{
        T.DataType.Name(t): lambda t=t: weights_in(t, block=16)
        for t in (T.INT8, T.INT4, T.FLOAT8E4M3FN, T.FLOAT4E2M1)
    },
    "NVFP4 weights": twice_scaled,
    "float8 in another shape": turned_between,
}
"""Few bits as they should be: no rule complains, and they build."""

FAULTS: dict[str, Callable[[bool], onnx.ModelProto]] = {
    "opset": opset,
    "refused-operators": data_dependent,
    "known-operators": lambda bad: one("Erf" if bad else "Sigmoid"),
    "wide-normalization": stash,
    "wide-exponentials": lambda bad: one("Softplus", dtype=T.FLOAT16 if bad else T.FLOAT),
    "attention-causal": lambda bad: attention(is_causal=int(bad)),
    "attention-lengths": lambda bad: attention(nonpad=bad),
    "attention-mask": lambda bad: attention(mask=None if bad else T.BOOL),
    "attention-mask-type": lambda bad: attention(mask=T.FLOAT16 if bad else T.BOOL),
    "attention-head-size": lambda bad: attention(size=264 if bad else 256),
    "attention-float32": lambda bad: attention(T.FLOAT if bad else T.FLOAT16),
    "cache-in-place": cache_is_input,
    "cache-readers": cache_readers,
    "cache-indices": lambda bad: cache(indices=not bad),
    "quantized-scale": lambda bad: quantized(zero(), scale=0.0 if bad else 0.1),
    "quantized-blocks": blocks,
    "quantized-values": narrow_value,
    "one-type": lambda bad: two("Mul", (T.FLOAT16, T.FLOAT if bad else T.FLOAT16)),
    "known-types": lambda bad: one("Relu", dtype=T.DOUBLE if bad else T.FLOAT),
    "finite-constants": infinite,
    "declared-types": declared,
    "inputs-are-read": unread,
    "shapes-from-shapes": shape_from_value,
}
"""Rule -> the model with the fault (True) or without it (False)."""

FORMS: dict[str, tuple[str, Callable[[bool], onnx.ModelProto]]] = {
    "another domain": ("refused-operators", domain),
    "causal without a mask": (
        "attention-causal",
        lambda bad: attention(is_causal=int(bad), mask=None if bad else T.BOOL),
    ),
    "a result that stays inside": ("cache-in-place", cache_is_output),
    "a stored weight, transposed": ("quantized-values", stored),
    "another type of keys": ("one-type", lambda bad: cache(update=T.FLOAT if bad else T.FLOAT16)),
    "no type said": (
        "known-types",
        lambda bad: quantized(None) if bad else quantized(None, output_dtype=T.INT8),
    ),
    "a shape alone": ("inputs-are-read", shape_only),
}
"""Other forms of some faults, with their rules."""
