"""Engines from a bundle's graphs: one builder a target, chosen by name and imported only then."""

from __future__ import annotations

from collections.abc import Callable

from twotower.builders.base import BuildConfig, EngineBuilder
from twotower.builders.build import build_engines
from twotower.errors import BuildError
from twotower.extras import TARGET_EXTRA, install_command
from twotower.tensorrt_library import Variant, load_tensorrt, load_tensorrt_rtx

__all__ = ["BUILDERS", "BuildConfig", "EngineBuilder", "build_engines", "builder_for"]


def _onnx_runtime(target: str) -> EngineBuilder:
    from twotower.builders.ort.cpu import make_builder

    return make_builder(target)


def _tensorrt(load: Callable[[], Variant]) -> EngineBuilder:
    library = load()  # what is missing is the library, not the builder
    from twotower.builders.trt.tensorrt_builder import TensorRTBuilder

    return TensorRTBuilder(library)


BUILDERS: dict[str, Callable[[], EngineBuilder]] = {
    "ort-cpu": lambda: _onnx_runtime("ort-cpu"),
    "ort-cuda": lambda: _onnx_runtime("ort-cuda"),
    "rtx": lambda: _tensorrt(load_tensorrt_rtx),
    "trt": lambda: _tensorrt(load_tensorrt),
}
"""Target name -> creator of its builder."""


def builder_for(target: str) -> EngineBuilder:
    """The builder of a target; BuildError if unknown or its library is not installed."""
    if target not in BUILDERS:
        raise BuildError(
            f"there is no builder for target {target!r}",
            found=f"known targets: {', '.join(BUILDERS)}",
            do="choose one of them",
        )
    try:
        return BUILDERS[target]()
    except (ImportError, OSError) as e:  # OSError: the bindings are there and the library is not
        do = install_command(TARGET_EXTRA[target])
        if target == "trt":
            do += ": the wheels fetch the library from NVIDIA's own package index, pypi.nvidia.com"
        raise BuildError(
            f"target {target} cannot be built here", found=f"a library is missing: {e}", do=do
        ) from e
