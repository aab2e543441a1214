"""ONNX files whose weights lie outside: what they hold, and the edits builders and the export check both need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from twotower.config.weights import WeightRef, aligned

__all__ = [
    "TYPE_NAMES",
    "attach_weights",
    "detach_weights",
    "load_graph",
    "located_weights",
    "read_weight",
    "weight_refs",
    "widen_data",
    "widen_to_float32",
]

TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.FLOAT8E4M3FN: "float8e4m3fn",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT4E2M1: "float4e2m1",
}
"""Types a weight can be stored as, by ONNX's number."""

_CODES = {name: code for code, name in TYPE_NAMES.items()}
_PIECE = 4 << 20  # elements widened at a time
_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def weight_refs(model: onnx.ModelProto) -> dict[str, WeightRef]:
    """The external initializers of a model loaded without its data."""
    return {name: ref for name, (_, ref) in located_weights(model).items()}


def located_weights(model: onnx.ModelProto) -> dict[str, tuple[str, WeightRef]]:
    """The external initializers of a model loaded without its data, each with the file it names."""
    out: dict[str, tuple[str, WeightRef]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {e.key: e.value for e in tensor.external_data}
            ref = WeightRef(TYPE_NAMES[tensor.data_type], tuple(tensor.dims), int(entries["offset"]))
            out[tensor.name] = (entries["location"], ref)
    return out


def read_weight(data: np.ndarray[Any, np.dtype[np.uint8]], ref: WeightRef) -> np.ndarray[Any, np.dtype[Any]]:
    """One weight out of a mapped data file: a view where a byte or more is an element, bfloat16 widened to float32 (a copy).

    Types of 4 bits are unpacked (a copy): int4 to int8, float4e2m1 to the type of that name in ml_dtypes.
    """
    raw = data[ref.offset : ref.offset + ref.nbytes]
    if ref.dtype == "bfloat16":
        wide = raw.view(np.uint16).astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32).reshape(ref.shape)
    if ref.dtype in ("int4", "float4e2m1"):
        halves = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)[: math.prod(ref.shape)]
        if ref.dtype == "int4":
            return np.asarray((halves.astype(np.int8) ^ 8) - 8).reshape(ref.shape)
        floats: np.ndarray[Any, np.dtype[Any]] = halves.view(ml_dtypes.float4_e2m1fn).reshape(ref.shape)
        return floats
    dtype: Any = ml_dtypes.float8_e4m3fn if ref.dtype == "float8e4m3fn" else ref.dtype
    out: np.ndarray[Any, np.dtype[Any]] = raw.view(np.dtype(dtype)).reshape(ref.shape)
    return out


def detach_weights(model: onnx.ModelProto, refs: Mapping[str, WeightRef] | None = None) -> None:
    """Turns external initializers into graph inputs: whoever reads the graph then can neither copy nor fold them.

    Args:
        model: A model loaded without its weights' data, changed in place.
        refs: The ones to turn; None for all.
    """
    refs = weight_refs(model) if refs is None else refs
    kept = [t for t in model.graph.initializer if t.name not in refs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, ref in refs.items():
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, _CODES[ref.dtype], list(ref.shape)))


def attach_weights(model: onnx.ModelProto, refs: dict[str, WeightRef], location: str) -> None:
    """Makes the named inputs, or external initializers, external initializers in the file `location`."""
    kept = [i for i in model.graph.input if i.name not in refs]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    inline = [t for t in model.graph.initializer if t.name not in refs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(inline)
    for name, ref in refs.items():
        tensor = TensorProto(name=name, data_type=_CODES[ref.dtype], dims=ref.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", ref.offset), ("length", ref.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)


def widen_to_float32(model: onnx.ModelProto) -> None:
    """Makes a float16 or bfloat16 graph compute in float32: types of inputs, outputs, weights and casts, in place.

    For engines whose machine has no arithmetic of that width. The data of external weights must be widened by the caller.
    """
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in _NARROW:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type not in _NARROW:
            continue
        if tensor.data_location != TensorProto.EXTERNAL:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
            continue
        tensor.data_type = TensorProto.FLOAT
        for entry in tensor.external_data:
            if entry.key == "length":
                entry.value = str(2 * int(entry.value))
    for attribute in _cast_targets(model):
        if attribute.i in _NARROW:
            attribute.i = TensorProto.FLOAT


def widen_data(source: Path, target: Path, refs: dict[str, WeightRef], tick: Callable[[int], None] | None = None) -> dict[str, WeightRef]:
    """Copies weights into a data file, in float32 what is of half width and as they are the quantized ones, 16 MiB at a time.

    Args:
        source: The data file `refs` points into.
        target: The file to write.
        refs: The weights to take.
        tick: Called with the bytes read for each piece.

    Returns:
        Where the weights lie in the new file.
    """
    data = np.memmap(source, dtype=np.uint8, mode="r")
    out: dict[str, WeightRef] = {}
    end = 0
    with target.open("wb") as file:
        for name, ref in sorted(refs.items(), key=lambda item: item[1].offset):
            kept = WeightRef("float32" if ref.narrow else ref.dtype, ref.shape, 0)
            out[name] = replace(kept, offset=aligned(end, kept.nbytes))
            file.seek(out[name].offset)
            for piece in _pieces(data, ref):
                piece.tofile(file)
                if tick:
                    tick(piece.nbytes // 2 if ref.narrow else piece.nbytes)
            end = out[name].offset + out[name].nbytes
    return out


def _pieces(data: np.ndarray[Any, np.dtype[np.uint8]], ref: WeightRef) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    if not ref.narrow:
        for first in range(ref.offset, ref.offset + ref.nbytes, 4 * _PIECE):
            yield data[first : min(first + 4 * _PIECE, ref.offset + ref.nbytes)]
        return
    count = math.prod(ref.shape)
    for first in range(0, count, _PIECE):
        piece = WeightRef(ref.dtype, (min(_PIECE, count - first),), ref.offset + first * 2)
        yield read_weight(data, piece).astype(np.float32, copy=False)


def _cast_targets(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    for node in model.graph.node:
        if node.op_type == "Cast":
            yield from (a for a in node.attribute if a.name == "to")


def load_graph(path: Path) -> onnx.ModelProto:
    """A model without its weights' data."""
    return onnx.load(str(path), load_external_data=False)
