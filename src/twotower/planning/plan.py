"""A plan: engines, memory, disk and time of a bundle for one target, by arithmetic on the config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from twotower.builders.build_cost import build_memory, build_seconds, program_bytes
from twotower.builders.cut import tower_cuts
from twotower.config.model import ModelConfig
from twotower.hardware import TARGETS
from twotower.planning.devices import DeviceNeed, device_needs
from twotower.planning.memory import State, Traffic, needed_weights, state_bytes, tower_scratch, traffic
from twotower.planning.options import TENSORRT, PlanOptions, all_formats, engine_dtype, left_out, require_sound, rounded_of, segments_of
from twotower.planning.scratch import Scratch
from twotower.planning.weights import GraphWeights, checkpoint_bytes, cpu_bytes, graph_weights, item_bytes

__all__ = [
    "EXPORT_MEMORY",
    "Disk",
    "EnginePlan",
    "Plan",
    "plan_bundle",
]

EXPORT_MEMORY = 200_000_000
"""Anonymous bytes an export needs at most, whatever the model: it streams (103 MB were measured on a slice of published widths)."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine to be built.

    Attributes:
        name: Its file.
        graph: The graph it is of.
        layers: First layer and the one after the last.
        weight_bytes: Of the weights it works with.
        held_bytes: Of those it holds itself: a second copy, beside the bundle's.
        build_peak_bytes: Host memory its build needs at the peak; None where nothing is compiled.
        build_seconds: Of one processor, with what it holds in the page cache; None where nothing is compiled.
        engine_bytes: Its size on disk; of ONNX Runtime without the graph itself, which is under a megabyte.
    """

    name: str
    graph: str
    layers: tuple[int, int]
    weight_bytes: int
    held_bytes: int
    build_peak_bytes: int | None
    build_seconds: float | None
    engine_bytes: int


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes on disk, any of which may be left out.

    Attributes:
        checkpoint: The checkpoint.
        bundle: The bundle's weights.
        engines: Of every target, whole towers.
        copies: Of these, weights that lie there a second time: as constants, or widened for a CPU.
    """

    checkpoint: int
    bundle: int
    engines: Mapping[str, int]
    copies: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a bundle takes on one target.

    Attributes:
        options: What it was made for.
        dtype: Element type the engines compute in.
        parameters: Weights of both towers.
        weights: Weight bytes of every graph the mode uses.
        engines: In the order they are built.
        state: What rows keep.
        scratch: Activation memory by graph.
        devices: What each device holds.
        traffic: What a pass reads.
        disk: Files.
        left_out: Formats of experts that are no alternative here, because a pass would expand them in device memory.
    """

    options: PlanOptions
    dtype: str
    parameters: int
    weights: Mapping[str, GraphWeights]
    engines: tuple[EnginePlan, ...]
    state: State
    scratch: Mapping[str, Scratch]
    devices: tuple[DeviceNeed, ...]
    traffic: Traffic
    disk: Disk
    left_out: tuple[str, ...] = ()

    @property
    def build_peak(self) -> int:
        """Host memory of the most demanding build; engines are built one after the other. 0 where nothing is compiled."""
        return max((e.build_peak_bytes or 0 for e in self.engines), default=0)

    @property
    def build_seconds(self) -> float | None:
        """Of all engines; None where nothing is compiled."""
        return sum(e.build_seconds or 0.0 for e in self.engines) or None

    @property
    def held(self) -> int:
        """Bytes of weights that the engines hold themselves."""
        return sum(e.held_bytes for e in self.engines)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "options": asdict(self.options),
            "dtype": self.dtype,
            "parameters": self.parameters,
            "weights": {
                name: {"total": w.total, "by_kind": dict(w.by_kind), "by_dtype": dict(w.by_dtype)} for name, w in self.weights.items()
            },
            "engines": [asdict(e) for e in self.engines],
            "state": {**asdict(self.state), "total": self.state.total},
            "scratch": {name: asdict(s) for name, s in self.scratch.items()},
            "devices": [{**asdict(d), "total": d.total} for d in self.devices],
            "traffic": asdict(self.traffic),
            "left_out": list(self.left_out),
            "disk": {
                "checkpoint": self.disk.checkpoint,
                "bundle": self.disk.bundle,
                "engines": dict(self.disk.engines),
                "copies": dict(self.disk.copies),
            },
            "host": {"export": EXPORT_MEMORY, "build_peak": self.build_peak, "build_seconds": self.build_seconds},
        }


def plan_bundle(config: ModelConfig, options: PlanOptions | None = None) -> Plan:
    """The plan of a model for one target; touches no hardware and no file.

    Raises:
        ConfigError: options that contradict one another, the target or the model.
        BuildError: a single layer needs more than `max_build_memory`.
    """
    wanted = options or PlanOptions()
    require_sound(config, wanted)
    weights = needed_weights(config, wanted)
    return Plan(
        options=wanted,
        dtype=engine_dtype(config, wanted),
        parameters=checkpoint_bytes(config) // item_bytes(config.dtype),
        weights=weights,
        engines=tuple(engine for name, w in weights.items() for engine in _engines(name, w, config, wanted)),
        state=state_bytes(config, wanted),
        scratch=tower_scratch(config, wanted),
        devices=device_needs(config, wanted),
        traffic=traffic(config, wanted),
        disk=_disk(config, wanted),
        left_out=left_out(config, wanted),
    )


def _engines(graph: str, weights: GraphWeights, config: ModelConfig, options: PlanOptions) -> list[EnginePlan]:
    if options.target not in TENSORRT:
        layers, size = (0, len(weights.layers)), weights.total
        kept = options.dtype or config.dtype
        stored = cpu_bytes(config, kept, all_formats(options))[graph] if options.target == "ort-cpu" else 0
        return [EnginePlan(f"{graph}.onnx", graph, layers, size, stored, None, None, stored)]
    cuts = tower_cuts(weights.layers, weights.held, segments=segments_of(options), bound=options.max_build_memory)
    return [
        _engine(f"{graph}.engine" if len(cuts) == 1 else f"{graph}.{number}.engine", graph, layers, weights)
        for number, layers in enumerate(cuts)
    ]


def _engine(file: str, graph: str, layers: tuple[int, int], weights: GraphWeights) -> EnginePlan:
    first, end = layers
    held = weights.held.between(first, end)
    packed = round(weights.packed * held / weights.held.total) if held else 0
    return EnginePlan(
        name=file,
        graph=graph,
        layers=layers,
        weight_bytes=weights.between(first, end),
        held_bytes=held,
        build_peak_bytes=build_memory(held, end - first, largest_packed=weights.held.largest_packed),
        build_seconds=build_seconds(graph, end - first, held=held, packed=packed),
        engine_bytes=held + program_bytes(graph, end - first),
    )


def _disk(config: ModelConfig, options: PlanOptions) -> Disk:
    """Graphs and tokenizer, a few megabytes, are left out."""
    dtype = options.dtype or config.dtype
    formats = all_formats(options)
    kept = graph_weights(config, dtype, formats, rounded_of(options))
    wide = sum(cpu_bytes(config, dtype, formats).values())
    held = sum(w.held.total for w in kept.values())
    programs = sum(program_bytes(name, len(w.layers)) for name, w in kept.items())
    copies = {"rtx": held, "trt": held, "ort-cuda": 0, "ort-cpu": wide}
    sizes = {target: size + (programs if target in TENSORRT else 0) for target, size in copies.items()}
    return Disk(
        options.checkpoint_bytes or checkpoint_bytes(config),
        sum(w.stored for w in kept.values()),
        {target: sizes[target] for target in TARGETS},
        {target: copies[target] for target in TARGETS},
    )
