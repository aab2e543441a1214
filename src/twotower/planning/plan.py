"""A plan: engines, memory, disk and time of a bundle for one target, by arithmetic on the config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from twotower.builders.cut import build_memory, cut_layers, most_weights
from twotower.config.model import ModelConfig
from twotower.hardware import TARGETS
from twotower.planning.memory import DeviceNeed, State, Traffic, device_needs, needed_weights, state_bytes, tower_scratch, traffic
from twotower.planning.options import TENSORRT, PlanOptions, all_formats, engine_dtype, left_out, require_sound, rounded_of
from twotower.planning.scratch import Scratch
from twotower.planning.weights import GraphWeights, checkpoint_bytes, cpu_bytes, graph_weights, item_bytes
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER

__all__ = [
    "BUILD_SECONDS_COLD",
    "BUILD_SECONDS_LAYER",
    "BUILD_SECONDS_WARM",
    "CODE_BYTES",
    "EXPORT_MEMORY",
    "Disk",
    "EnginePlan",
    "Plan",
    "plan_bundle",
]

BUILD_SECONDS_WARM, BUILD_SECONDS_COLD = 4e-9, 84 / 2.6e9
"""Seconds a byte of weights on two cores: from the page cache as `make engines-real` measures them (docs/engines.md); from disk, one
published expert layer of 2.6 GB took 84 s."""

BUILD_SECONDS_LAYER = 0.5
"""Seconds a layer costs besides: 0.2 to 1 s were seen on models of 5 to 9 layers whose weights are negligible."""

CODE_BYTES = {CONTEXT: 16_000_000, CONTEXT_HEAD: 500_000, DENOISER: 7_000_000}
"""Bytes of an engine of TensorRT for RTX besides its weights: the same within 10 % for 5 to 9 layers, one to three compute capabilities."""

EXPORT_MEMORY = 200_000_000
"""Anonymous bytes an export needs at most, whatever the model: it streams (103 MB were measured on a slice of published widths)."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine to be built.

    Attributes:
        name: Its file.
        graph: The graph it is of.
        layers: First layer and the one after the last.
        weight_bytes: Of its weights.
        build_peak_bytes: Host memory its build needs at the peak; None where nothing is compiled.
        build_seconds: With the weights in the page cache; None where nothing is compiled.
        build_seconds_cold: With the weights on disk.
        engine_bytes: Its size on disk; of ONNX Runtime without the graph itself, which is under a megabyte.
    """

    name: str
    graph: str
    layers: tuple[int, int]
    weight_bytes: int
    build_peak_bytes: int | None
    build_seconds: float | None
    build_seconds_cold: float | None
    engine_bytes: int


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes on disk: the checkpoint, the bundle's graphs, and the engines of every target, any of which may be left out."""

    checkpoint: int
    bundle: int
    engines: Mapping[str, int]


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
    def build_seconds(self) -> tuple[float, float] | None:
        """Of all engines, from the page cache and from disk; None where nothing is compiled."""
        if not any(e.build_seconds for e in self.engines):
            return None
        return sum(e.build_seconds or 0.0 for e in self.engines), sum(e.build_seconds_cold or 0.0 for e in self.engines)

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
            "disk": {"checkpoint": self.disk.checkpoint, "bundle": self.disk.bundle, "engines": dict(self.disk.engines)},
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
        return [EnginePlan(f"{graph}.onnx", graph, layers, size, None, None, None, stored)]
    cuts: tuple[tuple[int, int], ...] = ((0, len(weights.layers)),)
    if options.max_build_memory is not None and weights.layers:
        most = most_weights(options.max_build_memory)
        cuts = cut_layers(weights.layers, first_extra=weights.before, last_extra=weights.after, most=most)
    out = []
    for number, (first, end) in enumerate(cuts):
        name = f"{graph}.engine" if len(cuts) == 1 else f"{graph}.{number}.engine"
        size = weights.between(first, end)
        compiling = BUILD_SECONDS_LAYER * (end - first)
        warm, cold = size * BUILD_SECONDS_WARM + compiling, size * BUILD_SECONDS_COLD + compiling
        out.append(EnginePlan(name, graph, (first, end), size, build_memory(size), warm, cold, size + CODE_BYTES[graph]))
    return out


def _disk(config: ModelConfig, options: PlanOptions) -> Disk:
    """Graphs and tokenizer, a few megabytes, are left out."""
    dtype = options.dtype or config.dtype
    formats = all_formats(options)
    kept = graph_weights(config, dtype, formats, rounded_of(options))
    wide = sum(cpu_bytes(config, dtype, formats).values())
    engine = sum(w.total for w in kept.values()) + sum(CODE_BYTES.values())
    # The chosen target's own count of segments is in `Plan.engines`.
    sizes = {"rtx": engine, "trt": engine, "ort-cuda": 0, "ort-cpu": wide}
    bundle = sum(w.stored for w in kept.values())
    return Disk(options.checkpoint_bytes or checkpoint_bytes(config), bundle, {target: sizes[target] for target in TARGETS})
