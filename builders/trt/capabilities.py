"""Compute capabilities engines are built for: asked for, the GPUs' own, or the library's choice."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.builders.base import KERNELS, BuildConfig
from twotower.bundle import Bundle
from twotower.checkpoint.layout import Role
from twotower.config.formats import WeightFormat
from twotower.errors import BuildError
from twotower.hardware import Machine
from twotower.tensorrt_library import Variant

DEFAULT_SMS = (86, 89, 120)
"""Without a GPU to ask: GeForce RTX 30, 40 and 50, and professional cards of their generations."""

HALF_ONLY_SM = 75
"""TensorRT for RTX has matrix products in float16 only for this compute capability."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a build is for.

    Attributes:
        sms: Compute capabilities its engines run on, e.g. 89; empty for a set the library chooses.
        named: Those the library is told; empty where it builds for the GPU at hand or chooses.
    """

    sms: tuple[int, ...]
    named: tuple[int, ...] = ()
    current: bool = False

    @property
    def half_only(self) -> bool:
        """Whether one of them has no matrix products but in float16."""
        return HALF_ONLY_SM in self.named


def chosen_capabilities(
    variant: Variant, bundle: Bundle, config: BuildConfig, machine: Machine
) -> Capabilities:
    """What a library builds for; BuildError if unsupported or without a GPU."""
    present = tuple(dict.fromkeys(gpu.sm for gpu in machine.gpus))
    if not variant.sms:
        return Capabilities(_at_hand(variant, config, present))
    formats = _formats_of_programs(bundle, config)
    first = max((f.first_sm for f in formats), default=0)
    if machine.rtx_any_sm and not config.sms:
        current = machine.rtx_any_sm == "current"
        sms = _at_hand(variant, config, present) if current else ()
        _require_formats(bundle, sms, formats)
        return Capabilities(sms, current=current)
    listed = tuple(sm for sm in sorted(present) if sm in variant.sms)
    usual = tuple(sm for sm in DEFAULT_SMS if sm >= first)
    chosen = tuple(sorted(set(config.sms))) or listed or usual
    unknown = [sm for sm in chosen if sm not in variant.sms]
    if unknown:
        raise BuildError(
            f"{_name(variant)} does not build for SM {', '.join(map(str, unknown))}",
            found=f"supported: {', '.join(map(str, variant.sms))}",
            do="choose others with --sm; for Hopper and data-centre Blackwell use `--target trt` "
            "or `--target ort-cuda`",
        )
    _require_formats(bundle, chosen, formats)
    if HALF_ONLY_SM in chosen and bundle.dtype != "float16":
        others = ", ".join(str(sm) for sm in variant.sms if sm != HALF_ONLY_SM)
        raise BuildError(
            f"SM {HALF_ONLY_SM} has no products in {bundle.dtype}",
            found=f"supported in {bundle.dtype}: {others}",
            do="export with --dtype float16, or leave it out of --sm",
        )
    return Capabilities(chosen, named=chosen)


def _at_hand(variant: Variant, config: BuildConfig, present: tuple[int, ...]) -> tuple[int, ...]:
    """The first GPU's capability, for a library that builds for it."""
    if config.sms or not present:
        raise BuildError(
            f"{_name(variant)} builds for the GPU at hand only",
            found="--sm was given" if config.sms else "there is no NVIDIA GPU here",
            do="build on the machine that will run it, or use `--target rtx`, which builds "
            "ahead of time for RTX GPUs",
        )
    return present[:1]


def _formats_of_programs(bundle: Bundle, config: BuildConfig) -> tuple[WeightFormat, ...]:
    """The quantized formats the library multiplies: kernels read those of experts on any GPU."""
    if config.experts != KERNELS:
        return bundle.formats
    kinds = dict((bundle.quantization or {}).get("recipe", {}).get("weights", {}))
    for expert in (Role.ROUTED_EXPERT, Role.SHARED_EXPERT):
        kinds.pop(expert.value, None)
    return tuple(f for f in bundle.formats if f.name in kinds.values())


def _require_formats(
    bundle: Bundle, sms: tuple[int, ...], formats: tuple[WeightFormat, ...]
) -> None:
    old = [sm for sm in sms if sm < max((f.first_sm for f in formats), default=0)]
    if old:
        raise BuildError(
            f"SM {old[0]} has no hardware for the formats of '{bundle.path}'",
            found=", ".join(f"{f.name} from SM {f.first_sm}" for f in formats),
            do="leave it out of --sm, or quantize with a recipe of formats it has "
            "(docs/quantization.md)",
        )


def _name(variant: Variant) -> str:
    return f"{variant.module.__name__} {variant.version}"
