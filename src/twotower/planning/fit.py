"""Which GPUs a plan fits, how fast they let a pass be at best, and what would fit instead."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from twotower.builders.base import KERNELS
from twotower.builders.trt.capabilities import HALF_ONLY_SM
from twotower.config.formats import FORMATS
from twotower.config.model import LayerKind, ModelConfig
from twotower.errors import ConfigError
from twotower.hardware import RTX_SMS
from twotower.planning.devices import DeviceNeed, device_needs
from twotower.planning.expert_path import expert_path, left_out, on_gpus, require_path
from twotower.planning.gpus import GpuModel
from twotower.planning.pass_cost import break_evens, pass_costs
from twotower.planning.plan_options import PlanOptions, all_formats, capacity_of, engine_dtype
from twotower.planning.weights import EXPERT_FORMATS, EXPERT_RECIPES
from twotower.planning.working_memory import needed_weights

ASSUMED_DISK_RATE = 3_000_000_000
"""Bytes a second, assumed for reading large files from one NVMe drive: PCIe 3.0 drives are
specified for 3 to 3.5 GB/s, 4.0 drives for 5 to 7. Network disks of clouds give a tenth of it."""

LEAST_CONTEXT = 256
"""Shorter texts are no alternative."""


@dataclass(frozen=True, slots=True)
class LoadTime:
    """Seconds of the two ways weights go until they are on their devices, which overlap.

    `disk` reads every byte once; `link` is PCIe at its published rate to the device that gets most,
    as each has a link of its own; None where the rate is not known.
    """

    disk: float
    link: float | None

    @property
    def seconds(self) -> float:
        """Of the slower one."""
        return max(self.disk, self.link or 0.0)

    @property
    def bound(self) -> str:
        """Which one that is: `disk` or `PCIe`."""
        if self.disk >= (self.link or 0.0):
            return "disk"
        return "PCIe"

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what follows of it."""
        return {**asdict(self), "seconds": self.seconds, "bound": self.bound}


@dataclass(frozen=True, slots=True)
class Alternative:
    """Other options (flags to type) and what they need: bytes on the fullest device.

    `recipe` of `twotower quantize` makes the experts; empty where they are as they were.
    """

    flags: str
    needs: int
    fits: bool
    recipe: str


@dataclass(frozen=True, slots=True)
class GpuFit:
    """A plan on one kind of GPU.

    `refused` says why the target cannot be run on it at all. Seconds are least times of a denoiser
    pass, a step of autoregression and the context tower over a finished block; None without such a
    pass or a known bandwidth; `by_arithmetic` names those (`pass`, `step`, `extension`) that the
    matrix units decide and not the memory. `break_even` has by rows the passes a block at which
    both modes take equally long; `load` is None where weights are not copied anywhere.
    """

    gpu: GpuModel
    refused: str
    devices: tuple[DeviceNeed, ...]
    fits: bool
    pass_seconds: float | None
    step_seconds: float | None
    extension_seconds: float | None
    by_arithmetic: tuple[str, ...]
    break_even: Mapping[int, float]
    load: LoadTime | None
    alternatives: tuple[Alternative, ...]

    @property
    def fullest(self) -> DeviceNeed:
        return max(self.devices, key=lambda d: d.total)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        load = self.load and self.load.to_json()
        added = {
            "title": self.gpu.title,
            "needs": self.fullest.total,
            "load": load,
        }
        return {**asdict(self), **added}


def fit(config: ModelConfig, options: PlanOptions, gpus: Sequence[GpuModel]) -> tuple[GpuFit, ...]:
    """The plan on each GPU; an entry of several GPUs sets the number of devices."""
    return tuple(_fit(config, options, gpu) for gpu in gpus)


def _fit(config: ModelConfig, asked: PlanOptions, gpu: GpuModel) -> GpuFit:
    devices = gpu.count if gpu.count > 1 else asked.devices
    options = on_gpus(replace(asked, devices=devices), [gpu.sm])
    needs, refused = device_needs(config, options), _refused(config, options, gpu)
    fits = not refused and max(d.total for d in needs) <= gpu.memory
    costs = pass_costs(config, options)
    passes = {
        "pass": costs.denoising,
        "step": costs.ar_step,
        "extension": costs.extension,
    }
    seconds = {name: cost.seconds(gpu) if cost else None for name, cost in passes.items()}
    load = None
    if options.target != "ort-cpu":  # which maps its weights and loads nothing
        nbytes = sum(w.total for w in needed_weights(config, options).values())
        most = max(d.weights for d in needs)
        link = most / gpu.link if gpu.link else None
        load = LoadTime(nbytes / (options.disk_rate or ASSUMED_DISK_RATE), link)
    return GpuFit(
        gpu=gpu,
        refused=refused,
        devices=needs,
        fits=fits,
        pass_seconds=seconds["pass"],
        step_seconds=seconds["step"],
        extension_seconds=seconds["extension"],
        by_arithmetic=tuple(
            name for name, cost in passes.items() if cost and cost.bound_by_arithmetic(gpu)
        ),
        break_even=break_evens(config, options, gpu),
        load=load,
        alternatives=() if fits or refused else tuple(_alternatives(config, options, gpu)),
    )


def _refused(config: ModelConfig, options: PlanOptions, gpu: GpuModel) -> str:
    if options.target == "rtx" and gpu.sm not in RTX_SMS:
        return f"rtx does not list SM {gpu.sm}; plan --target trt"
    half_only = options.target == "rtx" and gpu.sm == HALF_ONLY_SM
    if half_only and engine_dtype(config, options) != "float16":
        return f"SM {HALF_ONLY_SM} has float16 only; plan --dtype float16"
    if options.sms and gpu.sm not in options.sms:
        return f"--sm does not list SM {gpu.sm}"
    try:
        require_path(config, options)
    except ConfigError as e:
        return e.found
    return ""


def largest_batch(config: ModelConfig, options: PlanOptions, memory: int) -> int:
    """Most rows, up to those asked for, that fit so much memory a device; 0 if none does."""
    sizes = range(1, options.max_batch + 1)
    return bisect(
        sizes,
        memory,
        key=lambda n: _fullest(config, replace(options, max_batch=n)),
    )


def largest_context(config: ModelConfig, options: PlanOptions, memory: int) -> int:
    """Longest text, up to the one asked for, that fits the memory of a device; 0 if none does."""
    default = min(capacity_of(config, options), 4096, config.max_position_embeddings)
    sizes = range(LEAST_CONTEXT, (options.max_context or default) + 1)
    holding = bisect(
        sizes,
        memory,
        key=lambda n: _fullest(config, replace(options, max_context=n)),
    )
    return sizes[holding - 1] if holding else 0


def _fullest(config: ModelConfig, options: PlanOptions) -> int:
    return max(d.total for d in device_needs(config, options))


def _alternatives(
    config: ModelConfig, options: PlanOptions, gpu: GpuModel
) -> Iterator[Alternative]:
    enough: list[set[tuple[str, Any]]] = []  # changes that suffice alone: more of them is no news
    for changes in _changes(config, options, gpu):
        if any(few <= set(changes.items()) for few in enough):
            continue
        changed = replace(options, **changes)
        shrunk = _shrunk(config, changed, gpu.memory)
        if not changes and shrunk == changed:
            continue
        needs = _fullest(config, shrunk)
        if shrunk == changed and needs <= gpu.memory:
            enough.append(set(changes.items()))
        names = ("dtype", "experts", "devices", "mode", "max_batch", "max_context")
        flags = []
        for name in names:
            value = getattr(shrunk, name)
            if value != getattr(options, name):
                flags.append(f"--{name.replace('_', '-')} {value}")
        recipe = EXPERT_RECIPES.get(shrunk.experts or "", "")
        yield Alternative(
            " ".join(flags),
            needs,
            needs <= gpu.memory,
            recipe,
        )


def _changes(config: ModelConfig, options: PlanOptions, gpu: GpuModel) -> Iterator[dict[str, Any]]:
    """Changed options, mildest first: shorter or fewer texts, formats, devices, one tower."""
    narrow: list[dict[str, Any]] = [{}]
    if engine_dtype(config, options) == "float32" and options.target != "ort-cpu":
        narrow.append({"dtype": "bfloat16"})
    if LayerKind.MOE in config.layers and not all_formats(options) and options.target != "ort-cpu":
        half = {"dtype": "bfloat16"} if engine_dtype(config, options) == "float32" else {}
        narrow += [{**half, "experts": name} for name in _formats_on(config, options, gpu)]
    yield from narrow
    if options.devices == 1 and options.target != "ort-cpu":
        yield from ({**change, "devices": 2} for change in narrow)
    if options.mode == "diffusion":
        yield from ({**change, "mode": "ar"} for change in narrow)


def _formats_on(config: ModelConfig, options: PlanOptions, gpu: GpuModel) -> Iterator[str]:
    """Formats of experts that save memory on a GPU and cost no time.

    Kernels read any format on any GPU. Where the engine multiplies the hardware must have it, and
    for recipes that quantize inputs in any case: they quantize other layers too.
    """
    kernels = expert_path(config, options).name == KERNELS
    slow = left_out(config, options)
    for name in EXPERT_FORMATS:
        free = kernels and name not in ("int8", "fp8")
        if name not in slow and (free or not gpu.sm or gpu.sm >= FORMATS[name].first_sm):
            yield name


def _shrunk(config: ModelConfig, options: PlanOptions, memory: int) -> PlanOptions:
    """The same with fewer rows, or one row and shorter texts, where that makes it fit."""
    rows = largest_batch(config, options, memory)
    if rows:
        return replace(options, max_batch=rows)
    single = replace(options, max_batch=1)
    context = largest_context(config, single, memory)
    return replace(single, max_context=context) if context else options
