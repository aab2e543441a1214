"""Whether a plan asks for something that no build could make."""

from __future__ import annotations

from twotower.builders.base import KERNELS
from twotower.builders.trt.capabilities import HALF_ONLY_SM
from twotower.config.model import LayerKind, ModelConfig
from twotower.errors import ConfigError
from twotower.hardware import RTX_SMS
from twotower.planning.expert_path import require_path
from twotower.planning.options import PlanOptions, capacity_of, engine_dtype

__all__ = ["require_sound"]


def require_sound(config: ModelConfig, options: PlanOptions) -> None:
    """Refuses what no build could do.

    Raises:
        ConfigError: options that contradict the target or the model.
    """
    capacity_of(config, options)
    dtype, target = engine_dtype(config, options), options.target
    unknown = [sm for sm in options.sms if target == "rtx" and sm not in RTX_SMS]
    if options.sms and target != "rtx" and options.expert_path != KERNELS:
        found = "trt builds for the GPU at hand, ort-cuda (without --expert-path kernels) and ort-cpu compile nothing ahead"
        raise ConfigError(f"--sm is not for target {target}", found=found, do="leave --sm out, or plan --target rtx")
    if unknown:
        raise ConfigError(
            f"target rtx does not build for SM {', '.join(map(str, unknown))}",
            found=f"it lists {', '.join(map(str, RTX_SMS))}: not Hopper (90), not data-centre Blackwell (100)",
            do="choose others with --sm, or plan --target trt or --target ort-cuda",
        )
    if HALF_ONLY_SM in options.sms and dtype != "float16":
        raise ConfigError(
            f"SM {HALF_ONLY_SM} has no products in {dtype}", found="float16 only", do="add --dtype float16, or leave 75 out of --sm"
        )
    if options.experts and LayerKind.MOE not in config.layers:
        raise ConfigError("--experts does not apply", found="the model has no routed experts", do="leave --experts out")
    if options.experts and options.formats:
        found = f"in few bits: {', '.join(f'{k} {f}' for k, f in options.formats)}"
        raise ConfigError("--experts does not apply: the bundle is quantized", found=found, do="leave --experts out")
    require_path(config, options)
