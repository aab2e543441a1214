"""Plans the engines of one build: graph part, job and key of each; needs no library.

A graph is one engine, or is cut into segments of layers or into programs between experts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import KERNELS, BuildConfig
from twotower.builders.build_cost import LayerBytes, build_memory, program_bytes
from twotower.builders.expert_cut import ExpertCut, common_form
from twotower.builders.profiles import profiles
from twotower.builders.segment import BundleGraphs, Segment, fix_axes, layer_bytes, segment
from twotower.builders.trt.capabilities import Capabilities
from twotower.builders.trt.cut import least_bound, tower_cuts
from twotower.builders.trt.network import SETTINGS
from twotower.builders.weight_inputs import WeightPlaces, place_weights
from twotower.bundle import GRAPH_FILES, EngineFile, EngineLimits, ExpertsStep
from twotower.errors import BuildError
from twotower.graph_lint import require_clean
from twotower.graph_lint.view import GraphView
from twotower.records import encode
from twotower.spec import CONTEXT_HEAD
from twotower.tensorrt_library import Variant

_KEY_SCHEMA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine to be built.

    Attributes:
        model: The serialized graph the library is given.
        beside: A file in the folder the graph's weights lie in.
        places: Which of its weights are inputs and which it holds.
        job: What `child.main` is told, but for the places of its files.
        notes: What the graph rules note of the graph.
        operators: How often each operator is in it, the most frequent first.
    """

    graph: str
    engine: EngineFile
    model: bytes
    beside: Path
    places: WeightPlaces
    key: str
    job: dict[str, Any]
    notes: tuple[dict[str, str], ...]
    operators: dict[str, int]
    experts: ExpertsStep | None

    @property
    def build_memory(self) -> int:
        """Bytes of memory its build needs at its peak."""
        first, end = self.engine.layers
        held, packed = self.places.inside_bytes, self.places.largest_packed
        return build_memory(held, end - first, largest_packed=packed)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on disk."""
        first, end = self.engine.layers
        return self.places.inside_bytes * 101 // 100 + program_bytes(self.graph, end - first)


class EnginePlanner:
    """Plans the engines of one build.

    Args:
        gpu: Name, compute capability and driver of the GPU they are tuned for; None ahead of time.
    """

    def __init__(
        self,
        graphs: BundleGraphs,
        config: BuildConfig,
        *,
        variant: Variant,
        limits: EngineLimits,
        chosen: Capabilities,
        gpu: Mapping[str, Any] | None,
    ) -> None:
        self._graphs, self._bundle, self._config = graphs, graphs.bundle, config
        self._variant, self._limits, self._chosen, self._gpu = variant, limits, chosen, gpu
        self._sizes = {"T": limits.capacity, "S": self._bundle.trained_block_size}
        self._files: dict[tuple[str, str], str] = {}

    def engines(self) -> Iterator[EnginePlan]:
        """Engines in running order, one at a time: a tower's graph is some megabytes.

        Raises BuildError if a graph cannot be cut, or the graph rules refuse it.
        """
        for name in GRAPH_FILES:
            if self._config.experts == KERNELS and name != CONTEXT_HEAD:
                yield from self._programs(name)
            else:
                yield from self._segments(name)

    def _programs(self, name: str) -> Iterator[EnginePlan]:
        """A tower cut at its experts; equal programs share a file."""
        bundle = self._bundle
        signature = bundle.signatures[name].with_sizes(self._sizes)
        cut = ExpertCut(
            self._graph(name),
            signature,
            bundle.config,
            dtype=bundle.dtype,
        )
        for number in range(cut.programs):
            made, last = cut.program(number), number == cut.programs - 1
            if cut.programs == 1:
                yield self._engine(name, made, file=f"{name}.engine")
            else:
                # The program adds what the experts of the layer before it give: it begins there.
                first = max(made.layers[0] - 1, 0)
                plan = self._engine(name, made, shared_from=first)
                yield plan if last else replace(plan, experts=cut.experts(number))

    def _segments(self, name: str) -> Iterator[EnginePlan]:
        """One engine, unless the graph is cut for several devices or by the memory bound."""
        bundle, config = self._bundle, self._config
        signature = bundle.signatures[name].with_sizes(self._sizes)
        whole = layer_bytes(self._graphs.shared(name)).layers
        held = _held(self._graphs, name, config.weights)
        cuts = tower_cuts(whole, held, segments=config.segments, bound=config.max_build_memory)
        for number, layers in enumerate(cuts):
            made = segment(
                self._graph(name),
                signature,
                layers,
                dtype=bundle.dtype,
            )
            file = f"{name}.engine" if len(cuts) == 1 else f"{name}.{number}.engine"
            yield self._engine(name, made, file=file)

    def _graph(self, name: str) -> onnx.ModelProto:
        model = self._graphs.copied(name)
        fix_axes(model, self._sizes)
        return model

    def _engine(
        self, graph: str, made: Segment, *, file: str = "", shared_from: int | None = None
    ) -> EnginePlan:
        """Plans one engine; without `file` it is numbered and equal programs share a file.

        From layer `shared_from` on, a program is like any other of its kind.
        """
        bundle, model = self._bundle, made.model
        if self._chosen.half_only:
            sum_float32_products(model)
        notes = require_clean(
            model,
            f"the graph of {file or graph}",
            error=BuildError,
            do="export the checkpoint again with this version of twotower (docs/graph-rules.md "
            "explains each rule)",
            fixed=True,
        )
        operators = Counter(node.op_type for node in model.graph.node)
        places = place_weights(model, self._config.weights)
        holds = ""
        if places.inside:
            bundle.require_weights(f"an engine that holds weights ({file or graph})")
            holds = bundle.data_identity(graph)
        names: dict[str, str] = {}
        if shared_from is not None:
            model, names = common_form(model, shared_from)
        rows, block = self._limits.max_batch, bundle.trained_block_size
        engine = EngineFile(
            file=file,
            layers=made.layers,
            inputs=made.inputs,
            outputs=made.outputs,
            profiles=profiles(graph, max_batch=rows, block_size=block),
            weights=places.inputs,
            constants=tuple(places.inside),
            names=names,
        )
        job, data = self._job(engine), model.SerializeToString()
        library = self._variant.library
        key = engine_key(job, data, holds=holds, library=library, gpu=self._gpu)
        numbered = f"{graph}.{sum(known == graph for known, _ in self._files)}.engine"
        file = self._files.setdefault((graph, key), file or numbered)
        return EnginePlan(
            graph=graph,
            engine=replace(engine, file=file),
            model=data,
            beside=bundle.graph_file(graph),
            places=places,
            key=key,
            job=job,
            notes=tuple(note.to_json() for note in notes),
            operators=dict(operators.most_common()),
            experts=None,
        )

    def _job(self, engine: EngineFile) -> dict[str, Any]:
        target, timings = self._variant.target, None
        if not self._variant.sms:
            timings = str(self._bundle.path / "engines" / f".{target}.timing")
        described = encode(engine)
        inputs = [[engine.own(name), dtype, axes] for name, dtype, axes in described["inputs"]]
        return {
            "target": target,
            "inputs": inputs,
            "profiles": described["profiles"],
            "sms": list(self._chosen.named),
            "current": self._chosen.current,
            "dtype": self._bundle.dtype,
            "timing_cache": timings,
        }


def engine_key(
    job: Mapping[str, Any],
    model: bytes,
    *,
    holds: str,
    library: Mapping[str, str],
    gpu: Mapping[str, Any] | None,
) -> str:
    """The name of an engine in the cache: 32 hexadecimal digits of all that decides what it is.

    Names and places of files do not decide.

    Args:
        job: What the build is told.
        model: The serialized graph the library is given.
        holds: SHA-256 of the file its weights lie in if it holds some of them; empty for a program
            that serves any checkpoint.
        library: Name and version.
        gpu: The GPU it is tuned for; None ahead of time.
    """
    identity = {
        "schema": _KEY_SCHEMA,
        "settings": SETTINGS,
        "graph": hashlib.sha256(model).hexdigest(),
        "holds": holds,
        "library": dict(library),
        "dtype": job["dtype"],
        "inputs": job["inputs"],
        "profiles": job["profiles"],
        "sms": job["sms"],
        "gpu": None if gpu is None else dict(gpu),
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def least_build_memory(graphs: BundleGraphs, weights: str) -> int:
    """The smallest bound on memory under which every graph can be cut into segments of layers."""
    return max(least_bound(_held(graphs, name, weights)) for name in GRAPH_FILES)


def _held(graphs: BundleGraphs, name: str, weights: str) -> LayerBytes:
    """Of a graph's weights those that its engines will hold."""
    model = graphs.copied(name)
    place_weights(model, weights)
    return layer_bytes(model)


def sum_float32_products(model: onnx.ModelProto) -> int:
    """Writes every MatMul of float32 values as a multiplication and a sum, in place.

    For compute capabilities whose compiler has no such product. A float16 tower has some: Mamba's
    scan and the router compute in float32, whatever the dtype. The compiler of TensorRT for RTX
    fuses the multiplication into the sum, so that the products of single elements do not lie in
    memory (tests/builders/trt/test_rtx.py holds the scratch of a prefill).
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
    columns, reduced, rows = (_axis(axis).name for axis in (-1, -2, -3))
    made = [
        onnx.helper.make_node(
            "Unsqueeze",
            [node.input[0], columns],
            [left],
        ),
        onnx.helper.make_node(
            "Unsqueeze",
            [node.input[1], rows],
            [right],
        ),
        onnx.helper.make_node("Mul", [left, right], [product]),
        onnx.helper.make_node(
            "ReduceSum",
            [product, reduced],
            [node.output[0]],
            keepdims=0,
        ),
    ]
    for part, new in zip(("left", "right", "product", "sum"), made, strict=True):
        new.name = f"{node.name}_{part}"
    return made


def _axis(axis: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor(
        f"float32_sums.axis{axis}",
        onnx.TensorProto.INT64,
        [1],
        [axis],
    )
