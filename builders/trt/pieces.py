"""What a bundle's graphs are cut into before they are compiled: whole graphs, segments of layers, or programs between experts.

Matrix products in float32 are written as sums for compute capabilities whose compiler has no such
product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from twotower.builders.base import KERNELS, BuildConfig
from twotower.builders.build_cost import LayerBytes
from twotower.builders.expert_cut import ExpertCut
from twotower.builders.segment import BundleGraphs, Segment, fix_axes, layer_bytes, segment
from twotower.builders.trt.cut import least_bound, tower_cuts
from twotower.builders.weight_inputs import place_weights
from twotower.bundle import GRAPH_FILES, ExpertsStep
from twotower.graph_lint.view import GraphView
from twotower.spec import CONTEXT_HEAD

__all__ = ["Piece", "least_build_memory", "pieces_of", "sum_float32_products"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One engine to be built.

    Attributes:
        graph: Of which graph.
        segment: What of it.
        name: Its file, if it gets one of its own.
        shared_from: The layer from which a program is like any other of its kind, so that equal
            ones are one file; None for an engine that is not shared.
        experts: What runs after it.
    """

    graph: str
    segment: Segment
    name: str
    shared_from: int | None = None
    experts: ExpertsStep | None = None


def pieces_of(
    graphs: BundleGraphs, config: BuildConfig, sizes: Mapping[str, int]
) -> Iterator[Piece]:
    """Every engine of a build, in the order they run, one at a time: the graph of a tower is some megabytes.

    Args:
        graphs: The graphs.
        config: How they are cut.
        sizes: Axes that become constants.

    Raises:
        BuildError: a graph cannot be cut as it is asked for.
    """
    for name in GRAPH_FILES:
        if config.experts == KERNELS and name != CONTEXT_HEAD:
            yield from _programs(graphs, name, sizes)
        else:
            yield from _segments(graphs, name, config, sizes)


def least_build_memory(graphs: BundleGraphs, weights: str) -> int:
    """The smallest bound on memory under which every graph can be cut into segments of layers."""
    return max(least_bound(_held(graphs, name, weights)) for name in GRAPH_FILES)


def _programs(graphs: BundleGraphs, name: str, sizes: Mapping[str, int]) -> Iterator[Piece]:
    bundle = graphs.bundle
    signature = bundle.signatures[name].with_sizes(sizes)
    cut = ExpertCut(_graph(graphs, name, sizes), signature, bundle.config, dtype=bundle.dtype)
    for number in range(cut.programs):
        made, last = cut.program(number), number == cut.programs - 1
        first = max(
            made.layers[0] - 1, 0
        )  # the layer whose experts come before: the program adds what they give
        file = f"{name}.engine" if cut.programs == 1 else ""
        yield Piece(
            graph=name,
            segment=made,
            name=file,
            shared_from=None if file else first,
            experts=None if last else cut.experts(number),
        )


def _segments(
    graphs: BundleGraphs, name: str, config: BuildConfig, sizes: Mapping[str, int]
) -> Iterator[Piece]:
    """A graph is one engine unless it is cut for several devices or by the memory bound."""
    bundle, cuts = graphs.bundle, _cuts(graphs, name, config)
    signature = bundle.signatures[name].with_sizes(sizes)
    for number, layers in enumerate(cuts):
        model = _graph(graphs, name, sizes)
        whole = name == CONTEXT_HEAD
        made = (
            Segment(model, layers, signature.inputs, signature.outputs)
            if whole
            else segment(model, signature, layers, dtype=bundle.dtype)
        )
        file = f"{name}.engine" if len(cuts) == 1 else f"{name}.{number}.engine"
        yield Piece(graph=name, segment=made, name=file)


def _graph(graphs: BundleGraphs, name: str, sizes: Mapping[str, int]) -> onnx.ModelProto:
    model = graphs.copied(name)
    fix_axes(model, sizes)
    return model


def _held(graphs: BundleGraphs, name: str, weights: str) -> LayerBytes:
    """Of a graph's weights those that its engines will hold."""
    model = graphs.copied(name)
    place_weights(model, weights)
    return layer_bytes(model)


def _cuts(graphs: BundleGraphs, name: str, config: BuildConfig) -> tuple[tuple[int, int], ...]:
    """Groups of layers, each an engine."""
    whole = layer_bytes(graphs.shared(name))
    held = _held(graphs, name, config.weights)
    return tower_cuts(whole.layers, held, segments=config.segments, bound=config.max_build_memory)


def sum_float32_products(model: onnx.ModelProto) -> int:
    """Writes every MatMul of float32 values as a multiplication and a sum, in place.

    A float16 tower has some: Mamba's scan and the router compute in float32, whatever the dtype.
    The compiler of TensorRT for RTX fuses the multiplication into the sum, so that the products of
    single elements do not lie in memory (tests/builders/test_rtx.py holds the scratch of a
    prefill).

    Returns:
        How many there were.
    """
    view = GraphView(model)
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "MatMul" and view.dtype(node.output[0]) == "float32":
            nodes += _summed(node)
            count += 1
        else:
            nodes.append(node)
    if count:
        model.graph.initializer.extend(_axis(axis) for axis in (-1, -2, -3))
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return count


def _summed(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """[..,M,K] x [..,K,N] as the sum over K of [..,M,K,1] * [..,1,K,N]."""
    left, right, product = (f"{node.output[0]}/{part}" for part in ("left", "right", "product"))

    def made(
        operator: str, inputs: list[str], output: str, part: str, **attributes: Any
    ) -> onnx.NodeProto:
        return onnx.helper.make_node(
            operator, inputs, [output], name=f"{node.name}_{part}", **attributes
        )

    return [
        made("Unsqueeze", [node.input[0], _axis(-1).name], left, "left"),
        made("Unsqueeze", [node.input[1], _axis(-3).name], right, "right"),
        made("Mul", [left, right], product, "product"),
        made("ReduceSum", [product, _axis(-2).name], node.output[0], "sum", keepdims=0),
    ]


def _axis(axis: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor(f"float32_sums.axis{axis}", onnx.TensorProto.INT64, [1], [axis])
