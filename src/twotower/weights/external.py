"""ONNX files whose weights lie outside: what they hold, and common edits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from twotower.dtypes import dtype_of_onnx, onnx_code
from twotower.weights.refs import WeightRef

_HALF_PRECISION = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def weight_refs(model: onnx.ModelProto) -> dict[str, WeightRef]:
    """The external initializers of a model loaded without its data."""
    return {name: ref for name, (_, ref) in located_weights(model).items()}


def located_weights(model: onnx.ModelProto) -> dict[str, tuple[str, WeightRef]]:
    """The external initializers of a model loaded without its data, each with the file it names."""
    out: dict[str, tuple[str, WeightRef]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {e.key: e.value for e in tensor.external_data}
            dtype = dtype_of_onnx(tensor.data_type)
            assert dtype is not None, tensor.data_type
            ref = WeightRef(
                dtype,
                tuple(tensor.dims),
                int(entries["offset"]),
            )
            out[tensor.name] = (entries["location"], ref)
    return out


def detach_weights(model: onnx.ModelProto, refs: Mapping[str, WeightRef] | None = None) -> None:
    """Turns external initializers into graph inputs, which nobody can copy or fold, in place.

    The model is loaded without its weights' data; `refs` are the ones to turn, None for all.
    """
    refs = weight_refs(model) if refs is None else refs
    drop_values(model.graph, refs)
    for name, ref in refs.items():
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(
                name,
                onnx_code(ref.dtype),
                list(ref.shape),
            )
        )


def attach_weights(model: onnx.ModelProto, refs: dict[str, WeightRef], location: str) -> None:
    """Makes the named inputs or initializers external initializers in the file `location`."""
    drop_values(model.graph, refs)
    for name, ref in refs.items():
        tensor = TensorProto(
            name=name,
            data_type=onnx_code(ref.dtype),
            dims=ref.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", location), ("offset", ref.offset), ("length", ref.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)


def drop_values(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Takes inputs and initializers out of a graph."""
    inputs = [value for value in graph.input if value.name not in names]
    initializers = [tensor for tensor in graph.initializer if tensor.name not in names]
    del graph.input[:], graph.initializer[:]
    graph.input.extend(inputs)
    graph.initializer.extend(initializers)


def widen_to_float32(model: onnx.ModelProto) -> None:
    """Makes a half-precision graph compute in float32, in place: inputs, outputs, weights, casts.

    The data of external weights must be widened by the caller.
    """
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in _HALF_PRECISION:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type not in _HALF_PRECISION:
            continue
        if tensor.data_location != TensorProto.EXTERNAL:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
            continue
        tensor.data_type = TensorProto.FLOAT
        for entry in tensor.external_data:
            if entry.key == "length":
                entry.value = str(2 * int(entry.value))
    for node in model.graph.node:
        for attribute in node.attribute:
            is_target = node.op_type == "Cast" and attribute.name == "to"
            if is_target and attribute.i in _HALF_PRECISION:
                attribute.i = TensorProto.FLOAT


def load_graph(path: Path) -> onnx.ModelProto:
    """A model without its weights' data."""
    return onnx.load(str(path), load_external_data=False)
