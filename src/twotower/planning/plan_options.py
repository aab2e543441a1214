"""What a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.builders.base import (
    AUTO,
    DEFAULT_MAX_BATCH,
    EXPERTS,
    BuildConfig,
)
from twotower.builders.profiles import cache_capacity
from twotower.config.generation import GenerationConfig
from twotower.config.model import ModelConfig
from twotower.errors import ConfigError
from twotower.hardware import TARGETS
from twotower.planning.weights import EXPERT_FORMATS, Formats

DTYPES = ("float32", "float16", "bfloat16")
MODES = ("diffusion", "ar")
TENSORRT = ("rtx", "trt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options of one plan; those that a build has too mean the same.

    Attributes:
        target: What would be built.
        dtype: Element type of the bundle, None for the checkpoint's.
        max_batch: Most rows.
        max_context: Longest text, None for 4096 or the model's own limit, whichever is less.
        max_build_memory: Bytes the build of one engine may need, None for no bound.
        sms: Compute capabilities to build for ahead of time.
        run_on: Compute capabilities of the GPUs it is for, where they are known.
        devices: GPUs to spread over: with two one tower each, with more segments of both.
        experts: Format of quantized routed experts, None for `dtype`.
        expert_path: What computes the experts, as `--experts` of a build says it; see
            `expert_path.expert_path`.
        formats: Of a quantized bundle: its quantized layer kinds, each with its format.
        rounded: Of a quantized bundle: its layer kinds whose products read quantized inputs too.
        mode: `diffusion` for both towers, `ar` for the context tower alone.
        block_size: Trained block size.
        checkpoint_bytes: Size of the checkpoint's tensors where it is known from their headers.
        disk_rate: Bytes a second the disk with the bundle is read at, None for an assumption.
    """

    target: str = "rtx"
    dtype: str | None = None
    max_batch: int = DEFAULT_MAX_BATCH
    max_context: int | None = None
    max_build_memory: int | None = None
    sms: tuple[int, ...] = ()
    run_on: tuple[int, ...] = ()
    devices: int = 1
    experts: str | None = None
    expert_path: str = AUTO
    formats: Formats = ()
    rounded: tuple[str, ...] = ()
    mode: str = "diffusion"
    block_size: int = GenerationConfig().block_size
    checkpoint_bytes: int | None = None
    disk_rate: int | None = None

    def __post_init__(self) -> None:
        BuildConfig(
            sms=self.sms,
            max_batch=self.max_batch,
            max_context=self.max_context,
            max_build_memory=self.max_build_memory,
        )
        for flag, value, allowed in (
            ("--target", self.target, TARGETS),
            ("--dtype", self.dtype, (None, *DTYPES)),
            ("--experts", self.experts, (None, *EXPERT_FORMATS)),
            ("--expert-path", self.expert_path, EXPERTS),
            ("--mode", self.mode, MODES),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{flag} cannot be {value!r}",
                    found=f"allowed: {', '.join(str(a) for a in allowed if a)}",
                    do=f"choose another {flag}",
                )
        if self.disk_rate is not None and self.disk_rate < 1:
            found = "allowed: 1 byte a second and more"
            do = "pass e.g. --disk-rate 7G"
            raise ConfigError(f"--disk-rate cannot be {self.disk_rate}", found=found, do=do)
        if self.devices < 1:
            raise ConfigError(
                f"--devices cannot be {self.devices}",
                found="allowed: 1 and more",
                do="pass a positive --devices",
            )


def all_formats(options: PlanOptions) -> Formats:
    """Quantized layer kinds as the bundle holds them."""
    formats = dict(options.formats)
    if options.experts:
        formats["routed_expert"] = options.experts
    return tuple(sorted(formats.items()))


def rounded_of(options: PlanOptions) -> tuple[str, ...]:
    """Layer kinds whose products are quantized on both sides; 8-bit experts where it is fast."""
    if options.experts in ("int8", "fp8") and options.target in TENSORRT:
        return ("routed_expert",)
    return options.rounded


def formats_of(options: PlanOptions) -> Formats:
    """The same as the engines hold them: `ort-cpu` has no 4-bit floats and expands them."""
    formats = all_formats(options)
    if options.target != "ort-cpu":
        return formats
    return tuple((kind, name) for kind, name in formats if name != "nvfp4")


def capacity_of(config: ModelConfig, options: PlanOptions) -> int:
    """Positions of keys and values a row gets."""
    return cache_capacity(options.max_context, config.max_position_embeddings)


def engine_dtype(config: ModelConfig, options: PlanOptions) -> str:
    """Element type the engines compute in: `ort-cpu` widens everything to float32."""
    if options.target == "ort-cpu":
        return "float32"
    return options.dtype or config.dtype
