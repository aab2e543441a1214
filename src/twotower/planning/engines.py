"""The engines a plan builds: whole graphs, segments of layers, or programs with experts between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from twotower.builders.base import DENSE, FUSED, KERNELS
from twotower.builders.build_cost import (
    LayerBytes,
    build_memory,
    build_seconds,
    program_bytes,
    require_bound,
)
from twotower.builders.trt.cut import even_layers, tower_cuts
from twotower.checkpoint.layout import Role
from twotower.config.formats import FORMATS
from twotower.config.model import LayerKind, ModelConfig
from twotower.dtypes import stored_bytes
from twotower.planning.expert_path import expert_path, segments_of
from twotower.planning.plan_options import TENSORRT, PlanOptions, all_formats
from twotower.planning.weights import GraphWeights, cpu_bytes, weight_counts

Layers = tuple[int, int]
"""The first layer and the one after the last."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine to be built.

    Attributes:
        name: Its file.
        graph: The graph it is of.
        layers: First layer and the one after the last; of equal programs those of the first. The
            experts that follow a program count as its last layer.
        weight_bytes: Of the weights of all programs it is, with the experts after them.
        held_bytes: Of those it holds itself: a second copy, beside the bundle's.
        build_peak_bytes: Host memory its build needs at the peak; None where nothing is compiled.
        build_seconds: Of one processor, with what it holds in the page cache and without kernels;
            None where nothing is compiled.
        engine_bytes: Its size on disk; of ONNX Runtime without the graph (under a megabyte).
        programs: How many equal programs of a tower it is.
    """

    name: str
    graph: str
    layers: Layers
    weight_bytes: int
    held_bytes: int = 0
    build_peak_bytes: int | None = None
    build_seconds: float | None = None
    engine_bytes: int = 0
    programs: int = 1


def engine_plans(
    config: ModelConfig,
    options: PlanOptions,
    *,
    graph: str,
    weights: GraphWeights,
) -> list[EnginePlan]:
    """Engines of one graph in build order; BuildError if one needs more than `max_build_memory`."""
    if options.target not in TENSORRT:
        layers, size = (0, len(weights.layers)), weights.total
        stored = own_bytes(config, options)[graph]
        pieces = placed_pieces(weights, config, options)
        if len(pieces) > 1:
            return [
                EnginePlan(f"{graph}.{n}.onnx", graph, layers, size)
                for n, (layers, size) in enumerate(pieces)
            ]
        engine = EnginePlan(f"{graph}.onnx", graph, layers, size, stored, engine_bytes=stored)
        return [engine]
    if weights.layers and expert_path(config, options).name == KERNELS:
        return _programs(graph, weights, config, bound=options.max_build_memory)
    segments, bound = segments_of(config, options), options.max_build_memory
    cuts = tower_cuts(weights.layers, weights.held, segments=segments, bound=bound)
    made = []
    for number, layers in enumerate(cuts):
        name = f"{graph}.{number}.engine" if len(cuts) > 1 else f"{graph}.engine"
        size, held = weights.all.between(*layers), weights.held.between(*layers)
        engine = EnginePlan(name, graph, layers, size, held)
        made.append(
            _compiled(
                engine,
                weights,
                layers[1] - layers[0],
            )
        )
    return made


def own_bytes(config: ModelConfig, options: PlanOptions) -> Mapping[str, int]:
    """Bytes of weights that an engine of ONNX Runtime has in a file of its own, by graph.

    For a CPU what is widened; on a GPU integers of fused experts, which are unsigned there.
    """
    formats, dtype = all_formats(options), options.dtype or config.dtype
    if options.target == "ort-cpu":
        as_stored = expert_path(config, options).name != DENSE
        return cpu_bytes(config, dtype, formats, as_stored=as_stored)
    few = dict(formats).get(Role.ROUTED_EXPERT.value)
    counts = weight_counts(config)
    if few is None or expert_path(config, options).name != FUSED:
        return dict.fromkeys(counts, 0)
    stored, experts = FORMATS[few].dtype, Role.ROUTED_EXPERT.value
    return {name: stored_bytes(stored, kinds.get(experts, 0)) for name, kinds in counts.items()}


def placed_pieces(
    weights: GraphWeights,
    config: ModelConfig,
    options: PlanOptions,
) -> tuple[tuple[Layers, int], ...]:
    """The pieces of a graph that are put on devices, in order, each with its weights' bytes."""
    if not weights.layers:
        return (((0, 0), weights.total),)
    if expert_path(config, options).name == KERNELS:
        programs = program_layers(config)
        return tuple((layers, _of_program(weights.all, layers, config)) for layers in programs)
    cuts = even_layers(weights.layers, segments_of(config, options))
    return tuple((layers, weights.all.between(*layers)) for layers in cuts)


def program_layers(config: ModelConfig) -> tuple[Layers, ...]:
    """The programs of a tower that is cut at its experts, each with the experts after it."""
    ends = [index + 1 for index in config.indices(LayerKind.MOE)]
    return tuple(pairwise((0, *ends, len(config.layers))))


def _programs(
    graph: str, weights: GraphWeights, config: ModelConfig, *, bound: int | None
) -> list[EnginePlan]:
    """Engines of a tower cut at its experts; equal programs without own weights share a file."""
    programs, files = program_layers(config), dict[tuple[object, ...], list[Layers]]()
    for number, layers in enumerate(programs):
        ends = (number == 0, number == len(programs) - 1)
        own = number if _of_program(weights.held, layers, config) else -1
        files.setdefault((ends, own, config.layers[slice(*layers)]), []).append(layers)
    made = []
    for number, equal in enumerate(files.values()):
        first = equal[0]
        mixers = sum(kind is not LayerKind.MOE for kind in config.layers[slice(*first)])
        size = sum(_of_program(weights.all, layers, config) for layers in equal)
        held = _of_program(weights.held, first, config)
        name = f"{graph}.{number}.engine"
        engine = EnginePlan(name, graph, first, size, held, programs=len(equal))
        made.append(_compiled(engine, weights, mixers))
    require_bound({e.name: e.build_peak_bytes or 0 for e in made}, bound)
    return made


def _of_program(places: LayerBytes, layers: Layers, config: ModelConfig) -> int:
    """Bytes of a program and the experts after it.

    What follows all layers is the last program's, without layers in a tower that ends with experts.
    """
    before_last = layers[1] == len(config.layers) and layers != program_layers(config)[-1]
    return places.between(*layers) - (places.after if before_last else 0)


def _compiled(engine: EnginePlan, weights: GraphWeights, mixers: int) -> EnginePlan:
    """The same with what its build takes, which computes so many mixers."""
    graph, held = engine.graph, engine.held_bytes
    packed = round(weights.packed * held / weights.held.total) if held else 0
    return replace(
        engine,
        build_peak_bytes=build_memory(held, mixers, largest_packed=weights.held.largest_packed),
        build_seconds=build_seconds(graph, mixers, held=held, packed=packed),
        engine_bytes=held + program_bytes(graph, mixers),
    )
