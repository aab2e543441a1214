"""A bundle's graphs during a build: constant capacity and block, and segments of their layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx

from twotower.builders.build_cost import LayerBytes
from twotower.bundle import Bundle
from twotower.dtypes import DTYPES, dtype_of_onnx, onnx_code, stored_bytes
from twotower.spec import (
    BLOCK,
    CONDITIONING,
    CONTEXT,
    DENOISER,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    TensorSpec,
    TowerSignature,
)
from twotower.weights.external import load_graph

_LAYER = re.compile(r"layers\.(\d+)\.")


class BundleGraphs:
    """The graphs of a bundle without their weights, some megabytes each, each read once."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._read: dict[str, onnx.ModelProto] = {}

    def shared(self, name: str) -> onnx.ModelProto:
        """A graph as it was exported, the same one every time: not to be changed."""
        if name not in self._read:
            self._read[name] = load_graph(self.bundle.graph_file(name))
        return self._read[name]

    def copied(self, name: str) -> onnx.ModelProto:
        """A graph of the caller's own."""
        model = onnx.ModelProto()
        model.CopyFrom(self.shared(name))
        return model


@dataclass(frozen=True, slots=True)
class Segment:
    """A graph of consecutive layers, with the signature it got."""

    model: onnx.ModelProto
    layers: tuple[int, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def fix_axes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Makes named axes constants, in place: TensorRT needs a static cache capacity."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def layer_bytes(model: onnx.ModelProto) -> LayerBytes:
    """Weight bytes by layer: a weight belongs to the layer whose node reads it."""
    sizes: dict[str, int] = {}
    packed = 0
    for tensor in model.graph.initializer:
        dtype = dtype_of_onnx(tensor.data_type)
        assert dtype is not None, tensor.data_type
        sizes[tensor.name] = stored_bytes(dtype, math.prod(tensor.dims))
        if DTYPES[dtype].bits == 4:
            packed = max(packed, sizes[tensor.name])
    layers: dict[int, int] = {}
    before = after = 0
    for node in model.graph.node:
        nbytes = sum(sizes.pop(name, 0) for name in node.input)
        index = _layer_of(node)
        if index is not None:
            layers[index] = layers.get(index, 0) + nbytes
        elif node.name.startswith(("norm_f", "lm_head", "sampler")):
            after += nbytes
        else:
            before += nbytes
    return LayerBytes(
        tuple(layers[i] for i in sorted(layers)),
        before,
        after,
        packed,
    )


def segment(
    model: onnx.ModelProto, signature: TowerSignature, layers: tuple[int, int], *, dtype: str
) -> Segment:
    """Layers [first, end) of a tower's graph as a graph; the whole graph if these are all.

    What every layer shares (masks, positions) is computed again in each segment from the graph's
    own inputs, which is cheap. Handed over are the residual stream and, because it is three large
    products, the denoiser's conditioning.
    """
    first, end = layers
    last_layer = _last_layer(model)
    if first == 0 and end > last_layer:
        return Segment(model, layers, signature.inputs, signature.outputs)
    nodes = list(model.graph.node)
    residual = partial(TensorSpec, dtype=dtype, axes=stream_axes(model, signature))
    given: dict[str, TensorSpec] = {}
    wanted: dict[str, TensorSpec] = {}
    if first > 0:
        given[stream_before(nodes, first)] = residual(RESIDUAL_IN)
    if end <= last_layer:
        wanted[stream_before(nodes, end)] = residual(RESIDUAL_OUT)
    if signature.name == DENOISER:
        (wanted if first == 0 else given).update(conditioning_of(model, dtype))
    wanted |= outputs_of(model, signature, layers)
    return extracted(model, signature, layers, given=given, wanted=wanted)


def stream_axes(model: onnx.ModelProto, signature: TowerSignature) -> tuple[str | int, ...]:
    """[B,L,D] of a tower's residual stream: L as a letter, or the constant length of a block."""
    if signature.name == CONTEXT:
        return ("B", "L", _width(model))
    block = next(value for value in model.graph.input if value.name == BLOCK)
    return ("B", block.type.tensor_type.shape.dim[1].dim_value or "S", _width(model))


def stream_before(nodes: Sequence[onnx.NodeProto], layer: int) -> str:
    """Name of the residual stream as a layer reads it."""
    return _last_output(nodes, f"layers.{layer - 1}." if layer else "embed/")


def conditioning_of(model: onnx.ModelProto, dtype: str) -> dict[str, TensorSpec]:
    """The denoiser's conditioning by its name in the whole graph, as segments hand it over."""
    name = _last_output(model.graph.node, "conditioning/")
    return {
        name: TensorSpec(
            CONDITIONING,
            dtype,
            ("B", 3, _width(model)),
        )
    }


def outputs_of(
    model: onnx.ModelProto, signature: TowerSignature, layers: tuple[int, int]
) -> dict[str, TensorSpec]:
    """Outputs that layers [first, end) make; the last layer's include what comes after."""
    first, end = layers
    makers = {name: _layer_of(node) for node in model.graph.node for name in node.output}
    last_layer = _last_layer(model)
    out = {}
    for spec in signature.outputs:
        index = makers[spec.name]
        if (end > last_layer) if index is None else first <= index < end:
            out[spec.name] = spec
    return out


def extracted(
    model: onnx.ModelProto,
    signature: TowerSignature,
    layers: tuple[int, int],
    *,
    given: Mapping[str, TensorSpec],
    wanted: Mapping[str, TensorSpec],
) -> Segment:
    """The nodes `wanted` needs when `given` is there, under the names both have in the segment."""
    keep = needed_nodes(model.graph.node, wanted, stop=given)
    renamed = {old: spec.name for old, spec in (*given.items(), *wanted.items())}
    nodes = []
    for i in keep:
        node = onnx.NodeProto()
        node.CopyFrom(model.graph.node[i])
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        nodes.append(node)
    constants = _settle_shapes(nodes, signature, tuple(given.values()))
    read = {name for node in nodes for name in node.input}
    by_name = {v.name: v for v in (*model.graph.input, *model.graph.output)}
    inputs = [*given.values(), *(s for s in signature.inputs if s.name in read)]
    outputs = list(wanted.values())
    graph = onnx.helper.make_graph(
        nodes,
        f"{signature.name}_{layers[0]}_{layers[1]}",
        [_value(s, by_name) for s in inputs],
        [_value(s, by_name) for s in outputs],
        [*(t for t in model.graph.initializer if t.name in read), *constants],
    )
    part = onnx.helper.make_model(
        graph,
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
        producer_name="twotower",
    )
    return Segment(part, layers, tuple(inputs), tuple(outputs))


def _settle_shapes(
    nodes: list[onnx.NodeProto], signature: TowerSignature, given: tuple[TensorSpec, ...]
) -> list[onnx.TensorProto]:
    """Lets no input be read for its shape alone, in place; the new constants.

    The compiler would report it as dropped, hiding a real loss. A constant axis becomes a constant;
    a dynamic one comes from the residual stream, which every segment but the first reads.
    """
    constants: list[onnx.TensorProto] = []
    stream = next((spec for spec in given if spec.name == RESIDUAL_IN), None)
    known = {spec.name: spec for spec in signature.inputs}
    for node in [n for n in nodes if n.op_type == "Shape" and n.input[0] in known]:
        ends = {a.name: a.i for a in node.attribute}
        part = slice(ends.get("start", 0), ends.get("end"))
        axes = known[node.input[0]].axes[part]
        if all(isinstance(axis, int) for axis in axes):
            constants.append(
                onnx.helper.make_tensor(
                    node.output[0],
                    onnx.TensorProto.INT64,
                    [len(axes)],
                    [int(axis) for axis in axes],
                )
            )
            nodes.remove(node)
        elif stream is not None and stream.axes[part] == axes:
            node.input[0] = stream.name
    return constants


def needed_nodes(
    nodes: Iterable[onnx.NodeProto], wanted: Iterable[str], *, stop: Iterable[str] = ()
) -> list[int]:
    """Indices, in order, of the nodes from which `wanted` is computed where `stop` is there."""
    listed = list(nodes)
    makers = {name: i for i, node in enumerate(listed) for name in node.output if name}
    seen: set[int] = set()
    todo, known = list(wanted), set(stop)
    while todo:
        name = todo.pop()
        if name in known or name not in makers:
            continue
        known.add(name)
        index = makers[name]
        if index not in seen:
            seen.add(index)
            todo += [n for n in listed[index].input if n]
    return sorted(seen)


def _value(spec: TensorSpec, known: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    """The graph's own value of that name, its axes already fixed, or a new one."""
    if spec.name in known:
        return known[spec.name]
    return onnx.helper.make_tensor_value_info(
        spec.name,
        onnx_code(spec.dtype),
        list(spec.axes),
    )


def _last_output(nodes: Iterable[onnx.NodeProto], scope: str) -> str:
    """Output of a scope's last node: a layer ends with its sum into the residual stream."""
    return str([node for node in nodes if node.name.startswith(scope)][-1].output[0])


def _layer_of(node: onnx.NodeProto) -> int | None:
    found = _LAYER.match(node.name)
    return int(found[1]) if found else None


def _last_layer(model: onnx.ModelProto) -> int:
    return max((i for i in map(_layer_of, model.graph.node) if i is not None), default=-1)


def _width(model: onnx.ModelProto) -> int:
    """D, the residual stream's width: the second axis of the embedding table."""
    table = next(t for t in model.graph.initializer if t.name.endswith("embeddings.weight"))
    return int(table.dims[1])
