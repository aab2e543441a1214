"""From an ONNX graph to a serialized engine: parse, check, configure, build."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle import Profile
from twotower.errors import BuildError
from twotower.files import write_atomically
from twotower.spec import TensorSpec
from twotower.tensorrt_library import Variant

SETTINGS: dict[str, Any] = {
    "cleared_flags": ["TF32"],  # float32 means float32
    "set_flags": ["REQUIRE_USER_ALLOCATION"],  # where the library has it: capture needs it
    "max_aux_streams": 0,  # one stream a pass: more cost hundreds of events and gain no bandwidth
    "profiling_verbosity": "DETAILED",
    # No fused kernel computes attention in these types: it may be taken apart.
    "decomposable_attention": ["float32"],
}
"""How the library is configured whatever is built; a part of every engine's key in the cache."""

EXPLAINED: tuple[tuple[str, str], ...] = (
    (
        r"Make sure (input|output) \S+ has Int64 binding",
        "token ids and lengths are int64 by contract, and that is how they are bound",
    ),
    (
        r"(cudaError|CUDA initialization failure|error) ?.*35|CUDA lib.*not found"
        r"|no CUDA-capable device|CUDA driver version is insufficient",
        "there is no GPU here; engines for named compute capabilities are built without one",
    ),
    (r"^the timing cache is not kept", "it saves time of the next build only; the engine is whole"),
)
"""Warnings that are understood: pattern and why it is harmless. Others are unexplained."""

_DROPPED = re.compile(r"Unused Input:|\[RemoveDeadLayers\] Input Tensor")
"""A graph input that was silently ignored."""

_NEXT = "read the reason; the graph is kept (docs/engines.md)"


@dataclass(slots=True)
class BuildLog:
    """Warnings and errors of one build, in order, each once with its count."""

    lines: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, severity: str, message: str) -> None:
        self.lines[severity, " ".join(message.split())] += 1

    def errors(self) -> list[str]:
        return [message for (severity, message) in self.lines if severity != "WARNING"]

    def to_json(self) -> list[dict[str, Any]]:
        """Every line with the reason it is harmless, or None."""
        return [
            {
                "severity": severity,
                "message": message,
                "count": count,
                "explained": explain(message),
            }
            for (severity, message), count in self.lines.items()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """What one engine is built for.

    Attributes:
        sms: Compute capabilities; empty for the GPU at hand, or for what a library that builds
            ahead of time makes of none.
        current: Tells a library that builds ahead of time to build for the GPU at hand.
        dtype: The graph's own: float32 keeps full precision in products, and lets attention be
            taken apart.
        timing_cache: File of measured kernels, for a library that measures; None for none.
    """

    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    sms: tuple[int, ...]
    dtype: str
    timing_cache: Path | None = None
    current: bool = False


def explain(message: str) -> str | None:
    """Why a line of the library's log is harmless, if it is known to be."""
    return next((why for pattern, why in EXPLAINED if re.search(pattern, message)), None)


def make_logger(trt: Any, log: BuildLog) -> Any:
    """The library's logger writing into `log`; a process has one, the library ignores a second."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps warnings and worse."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= trt.ILogger.Severity.WARNING.value:
                log.add(severity.name, message)

    return Logger()


def build_network(
    variant: Variant,
    graph: tuple[bytes, Path],
    options: NetworkOptions,
    *,
    log: BuildLog,
    tick: Callable[[str, int, int], bool],
) -> tuple[Any, dict[str, Any]]:
    """Builds one engine.

    Args:
        variant: The library.
        graph: The serialized model, and a file in the folder its weights lie in.
        options: What to build for.
        log: Gets the library's warnings and errors.
        tick: Called with (phase, step, steps); False cancels the build.

    Returns:
        The library's buffer with the serialized engine, and a report: operators by layer type and
        by type of output.
    """
    trt = variant.module
    sink = make_logger(trt, log)
    builder = trt.Builder(sink)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, sink)
    started = time.perf_counter()
    if not parser.parse(graph[0], path=str(graph[1])):
        errors = [parser.get_error(i).desc() for i in range(min(parser.num_errors, 3))]
        raise BuildError(
            "the ONNX parser refuses the graph",
            found="; ".join(errors) or "no reason given",
            do=_NEXT,
        )
    _check_inputs(log)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    if options.dtype in SETTINGS["decomposable_attention"]:
        # No fused kernel computes attention in float32: it may be taken apart. In half precision
        # losing the fused kernel is an error.
        for layer in layers:
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionBoundaryLayer
                layer.attention.decomposable = True
    parsed = time.perf_counter()
    facts = _counted(network)
    config = _configured(variant, builder, options, tick=tick)
    begun = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    facts["parse_seconds"] = round(parsed - started, 3)
    facts["build_seconds"] = round(time.perf_counter() - begun, 2)
    if plan is None:
        unknown = "it gives no reason (a cancelled build gives none either)"
        raise BuildError(
            f"{trt.__name__} {variant.version} cannot build this graph",
            found="; ".join(log.errors()[-3:]) or unknown,
            do=_NEXT,
        )
    _check_inputs(log)
    if options.timing_cache is not None and (cache := config.get_timing_cache()) is not None:
        try:
            write_atomically(options.timing_cache, memoryview(cache.serialize()))
        except OSError as e:  # losing it costs time only: no engine is lost over it
            log.add("WARNING", f"the timing cache is not kept: {e}")
    return plan, facts


def _counted(network: Any) -> dict[str, Any]:
    """Layers of the parsed network, before the compiler fuses them: known without a GPU."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    types = Counter(layer.type.name for layer in layers)
    outputs = Counter(
        str(layer.get_output(0).dtype.name) if layer.num_outputs else "none" for layer in layers
    )
    return {
        "layers_from": "walk",
        "layers": len(layers),
        "by_type": dict(types.most_common()),
        "by_precision": dict(outputs.most_common()),
    }


def _check_inputs(log: BuildLog) -> None:
    """Refuses a graph an input of which was dropped: the engine would compute something else."""
    dropped = [message for (_, message) in log.lines if _DROPPED.search(message)]
    if dropped:
        raise BuildError(
            "the library ignores an input of the graph", found="; ".join(dropped), do=_NEXT
        )


def _configured(
    variant: Variant,
    builder: Any,
    options: NetworkOptions,
    *,
    tick: Callable[[str, int, int], bool],
) -> Any:
    trt = variant.module
    config = builder.create_builder_config()
    for flag in SETTINGS["cleared_flags"]:
        config.clear_flag(getattr(trt.BuilderFlag, flag))
    for flag in SETTINGS["set_flags"]:
        if hasattr(trt.BuilderFlag, flag):  # TensorRT for RTX alone allocates while it enqueues
            config.set_flag(getattr(trt.BuilderFlag, flag))
    config.max_aux_streams = SETTINGS["max_aux_streams"]
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, SETTINGS["profiling_verbosity"])
    for profile in options.profiles:
        _add_profile(builder, config, options.inputs, profile)
    _set_capabilities(variant, config, options)
    if options.timing_cache is not None:
        # The measurements of earlier builds, or none where the library does not take those.
        known = [options.timing_cache.read_bytes()] if options.timing_cache.is_file() else []
        for measured in (*known, b""):
            timings = config.create_timing_cache(measured)
            if timings is not None and config.set_timing_cache(timings, False):
                break
    config.progress_monitor = _monitor(trt, tick)
    return config


def _set_capabilities(variant: Variant, config: Any, options: NetworkOptions) -> None:
    """Tells the library which GPUs to build for; the default is the one at hand or its own set."""
    trt = variant.module
    names = ["CURRENT"] if options.current else [f"SM{sm}" for sm in options.sms]
    if names:  # the count first: a slot does not exist before
        config.num_compute_capabilities = len(names)
    for slot, name in enumerate(names):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), slot):
            what, do = name, "choose others with --sm"
            if options.current:
                what, do = "the GPU at hand", f"{do}, or TWOTOWER_RTX_ANY_SM=default"
            raise BuildError(
                f"{trt.__name__} does not build for {what}",
                found=f"it lists {', '.join(map(str, variant.sms))}",
                do=do,
            )


def _add_profile(
    builder: Any,
    config: Any,
    inputs: Sequence[TensorSpec],
    profile: Profile,
) -> None:
    made = builder.create_optimization_profile()
    for spec in inputs:
        if not any(letter in spec.axes for letter in profile.axes):
            continue
        # Least, optimal and greatest sizes.
        sizes = [profile.axes[a] if isinstance(a, str) else (a, a, a) for a in spec.axes]
        made.set_shape(spec.name, *(tuple(size[which] for size in sizes) for which in range(3)))
    if config.add_optimization_profile(made) < 0:
        raise BuildError(
            "an optimization profile is refused",
            found=f"{profile}",
            do="report this: it is a defect of twotower",
        )


def _monitor(trt: Any, tick: Callable[[str, int, int], bool]) -> Any:
    """The library's progress as calls of `tick`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes phases on."""

        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return tick(
                phase_name,
                step + 1,
                self._steps.get(phase_name, 0),
            )

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
