"""Weights as inputs of the graph TensorRT is given: they are stored once, in the bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from twotower.builders.base import INSIDE
from twotower.dtypes import DTYPES, stored_bytes
from twotower.spec import TensorSpec
from twotower.weights.external import detach_weights, weight_refs


@dataclass(frozen=True, slots=True)
class WeightPlaces:
    """Which weights of a graph are inputs, in its order, and which stay inside, with the reason.

    Sizes are bytes of those inside; `largest_packed` is the largest 4-bit one.
    """

    inputs: tuple[TensorSpec, ...]
    inside: Mapping[str, str]
    inside_bytes: int
    largest_packed: int = 0

    @property
    def input_bytes(self) -> int:
        """Bytes of the weights that are inputs."""
        return sum(stored_bytes(s.dtype, math.prod(map(int, s.axes))) for s in self.inputs)

    def to_json(self) -> dict[str, Any]:
        """Plain data for build.json."""
        return {
            "inputs": len(self.inputs),
            "input_bytes": self.input_bytes,
            "inside": dict(self.inside),
            "inside_bytes": self.inside_bytes,
        }


def place_weights(model: onnx.ModelProto, places: str) -> WeightPlaces:
    """Makes external initializers inputs of the graph, in place.

    With `places` as `inputs`, those that `why_inside` names stay; with `inside`, all of them.
    """
    refs = weight_refs(model)
    asked = dict.fromkeys(refs, "asked for with --weights inside")
    inside = asked if places == INSIDE else why_inside(model)
    free = {name: ref for name, ref in refs.items() if name not in inside}
    detach_weights(model, free)
    held = [ref for name, ref in refs.items() if name in inside]
    return WeightPlaces(
        tuple(TensorSpec(name, ref.dtype, ref.shape) for name, ref in free.items()),
        inside,
        sum(ref.nbytes for ref in held),
        max((ref.nbytes for ref in held if DTYPES[ref.dtype].bits == 4), default=0),
    )


def why_inside(model: onnx.ModelProto) -> dict[str, str]:
    """The weights that TensorRT takes as constants only, each with the reason: quantized ones.

    4-bit types have no network input. An 8-bit input is taken, but the compiler transposes it in
    device memory in every pass, which a constant it transposes once, while it builds. A scale goes
    with its weight: the product of packed weights is chosen for constant scales.
    """
    refs = weight_refs(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    out: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in refs:
            continue
        values, scale = node.input[:2]
        dtype = refs[values].dtype
        why = "as an input it would be transposed in device memory in every pass"
        if DTYPES[dtype].bits == 4:
            why = f"TensorRT takes no network input of type {dtype}"
        out.setdefault(values, why)
        # Scales may be quantized themselves, with a scale of their own.
        for name in makers[scale].input if scale in makers else [scale]:
            if name in refs:
                out[name] = f"a scale of {values}, which is a constant"
    return out
