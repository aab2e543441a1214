"""A plan: engines, memory, disk and time of a bundle for one target, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from twotower.builders.base import DENSE, KERNELS
from twotower.builders.trt.capabilities import HALF_ONLY_SM
from twotower.config.model import LayerKind, ModelConfig
from twotower.dtypes import item_bytes
from twotower.errors import ConfigError
from twotower.hardware import RTX_SMS, TARGETS
from twotower.planning.devices import DeviceNeed, device_needs
from twotower.planning.engines import EnginePlan, engine_plans, own_bytes
from twotower.planning.expert_path import (
    ExpertPath,
    expert_path,
    left_out,
    require_path,
    segments_of,
)
from twotower.planning.pass_cost import ROWS, PassCosts, pass_costs
from twotower.planning.plan_options import (
    TENSORRT,
    PlanOptions,
    all_formats,
    capacity_of,
    engine_dtype,
    rounded_of,
)
from twotower.planning.scratch import Scratch
from twotower.planning.weights import GraphWeights, checkpoint_bytes, graph_weights
from twotower.planning.working_memory import (
    ExpertRoom,
    State,
    expert_room,
    needed_weights,
    state_bytes,
    tower_scratch,
)
from twotower.records import encode

EXPORT_MEMORY = 200_000_000
"""Anonymous bytes an export needs at most, whatever the model: it streams. 103 MB were measured on
a slice of published widths."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes on disk, any of which may be left out.

    `engines` are of every target, whole towers; `copies` those of their weights that lie there a
    second time, as constants or widened for a CPU.
    """

    checkpoint: int
    bundle: int
    engines: Mapping[str, int]
    copies: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a bundle takes on one target.

    Bytes of weights, scratch and engines (in build order) are of the graphs the mode uses; `room`
    is what kernels of experts need besides on every device. `passes` are by rows, those of `ROWS`
    and `max_batch`; `dense` is the same if every expert computed every token, empty where that is
    so. `left_out` are formats of experts a pass would expand in device memory, so no alternatives
    here.
    """

    options: PlanOptions
    dtype: str
    parameters: int
    weights: Mapping[str, GraphWeights]
    engines: tuple[EnginePlan, ...]
    state: State
    scratch: Mapping[str, Scratch]
    room: ExpertRoom
    devices: tuple[DeviceNeed, ...]
    experts: ExpertPath
    passes: Mapping[int, PassCosts]
    dense: Mapping[int, PassCosts]
    disk: Disk
    segments: int
    left_out: tuple[str, ...] = ()

    @property
    def build_peak(self) -> int:
        """Host memory of the largest build, 0 if nothing is compiled; engines are built in turn."""
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
            **encode(self, leave_out=("room", "segments")),
            "expert_room": encode(self.room),
            "host": {
                "export": EXPORT_MEMORY,
                "build_peak": self.build_peak,
                "build_seconds": self.build_seconds,
            },
        }


def plan_bundle(config: ModelConfig, options: PlanOptions | None = None) -> Plan:
    """The plan of a model for one target; touches no hardware and no file.

    Raises:
        ConfigError: options that contradict one another, the target or the model.
        BuildError: a single layer needs more than `max_build_memory`.
    """
    wanted = options or PlanOptions()
    require_sound(config, wanted)
    path = expert_path(config, wanted)
    passes, dense = {}, {}
    for rows in sorted({*ROWS, wanted.max_batch}):
        passes[rows] = pass_costs(config, wanted, rows)
        if path.chosen_only:
            dense[rows] = pass_costs(config, replace(wanted, expert_path=DENSE), rows)
    return Plan(
        options=wanted,
        dtype=engine_dtype(config, wanted),
        parameters=checkpoint_bytes(config) // item_bytes(config.dtype),
        weights=needed_weights(config, wanted),
        engines=_engines(config, wanted),
        state=state_bytes(config, wanted),
        scratch=tower_scratch(config, wanted),
        room=expert_room(config, wanted),
        devices=device_needs(config, wanted),
        experts=path,
        passes=passes,
        dense=dense,
        disk=_disk(config, wanted),
        segments=segments_of(config, wanted),
        left_out=left_out(config, wanted),
    )


def _disk(config: ModelConfig, options: PlanOptions) -> Disk:
    """Graphs and tokenizer, a few megabytes, are left out."""
    dtype = options.dtype or config.dtype
    kept = graph_weights(
        config,
        dtype,
        all_formats(options),
        rounded_of(options),
    )
    sizes, copies = {}, {}
    for target in TARGETS:
        o = replace(options, target=target, mode="diffusion", devices=1, max_build_memory=None)
        if target not in TENSORRT:
            sizes[target] = copies[target] = sum(own_bytes(config, o).values())
            continue
        engines = _engines(config, o)
        copies[target] = sum(engine.held_bytes for engine in engines)
        sizes[target] = sum(engine.engine_bytes for engine in engines)
    stored = sum(w.stored for w in kept.values())
    return Disk(
        options.checkpoint_bytes or checkpoint_bytes(config),
        stored,
        sizes,
        copies,
    )


def _engines(config: ModelConfig, options: PlanOptions) -> tuple[EnginePlan, ...]:
    out: list[EnginePlan] = []
    for name, weights in needed_weights(config, options).items():
        out += engine_plans(config, options, graph=name, weights=weights)
    return tuple(out)


def require_sound(config: ModelConfig, options: PlanOptions) -> None:
    """Refuses options that contradict the target or the model (ConfigError)."""
    capacity_of(config, options)
    dtype, target = engine_dtype(config, options), options.target
    unknown = [sm for sm in options.sms if target == "rtx" and sm not in RTX_SMS]
    if options.sms and target != "rtx" and options.expert_path != KERNELS:
        found = (
            "trt builds for the GPU at hand, ort-cuda (without --expert-path kernels) "
            "and ort-cpu compile nothing ahead"
        )
        raise ConfigError(
            f"--sm is not for target {target}",
            found=found,
            do="leave --sm out, or plan --target rtx",
        )
    if unknown:
        raise ConfigError(
            f"target rtx does not build for SM {', '.join(map(str, unknown))}",
            found=f"it lists {', '.join(map(str, RTX_SMS))}: not Hopper (90), "
            "not data-centre Blackwell (100)",
            do="choose others with --sm, or plan --target trt or --target ort-cuda",
        )
    if HALF_ONLY_SM in options.sms and dtype != "float16":
        raise ConfigError(
            f"SM {HALF_ONLY_SM} has no products in {dtype}",
            found="float16 only",
            do="add --dtype float16, or leave 75 out of --sm",
        )
    if options.experts and LayerKind.MOE not in config.layers:
        raise ConfigError(
            "--experts does not apply",
            found="the model has no routed experts",
            do="leave --experts out",
        )
    if options.experts and options.formats:
        kinds = ", ".join(f"{kind} {name}" for kind, name in options.formats)
        raise ConfigError(
            "--experts does not apply: the bundle is quantized",
            found=f"quantized: {kinds}",
            do="leave --experts out",
        )
    require_path(config, options)
