"""Plans of TensorRT for RTX by its own API and nothing else, for the trials of the section `rtx`.

`default` is the portable set that a build without any capability makes, `CURRENT` the GPU at hand,
whatever it is, and `SM80` and its like name one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twotower.builders.trt.network import SETTINGS

__all__ = ["PlanOptions", "Ranges", "build_plan", "make_logger"]

Ranges = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""For each input without a fixed shape the least, the best and the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a plan is built for.

    Attributes:
        capability: `default`, or a name of the library's `ComputeCapability`.
        profiles: The shapes of each optimization profile.
        dtype: Of the graph.
    """

    capability: str
    profiles: tuple[Ranges, ...]
    dtype: str = "float32"


def build_plan(trt: Any, logger: Any, graph: bytes, options: PlanOptions) -> Any | None:
    """A plan, configured as the project's builder does.

    Args:
        trt: The library.
        logger: Its logger.
        graph: The serialized graph.
        options: What it is built for.

    Returns:
        The library's buffer; None where it builds none, for the reason it logged.

    Raises:
        RuntimeError: the parser refuses the graph.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError("; ".join(errors))
    if options.dtype in SETTINGS["decomposable_attention"]:
        _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    for flag in SETTINGS["cleared_flags"]:
        config.clear_flag(getattr(trt.BuilderFlag, flag))
    for flag in SETTINGS["set_flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    config.max_aux_streams = SETTINGS["max_aux_streams"]
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, SETTINGS["profiling_verbosity"])
    if options.capability != "default":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, options.capability), 0)
    for ranges in options.profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in ranges.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def make_logger(trt: Any, tell: Callable[[str], None]) -> Any:
    """A logger that tells every line from INFO up, its severity first."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Of the library."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= trt.ILogger.Severity.INFO.value:
                tell(f"{severity.name}: {' '.join(message.split())[:400]}")

    return Logger()


def _allow_decomposition(trt: Any, network: Any) -> None:
    """No fused kernel computes attention in float32: it may be taken apart."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True
