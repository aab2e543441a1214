"""Import adapter of TensorRT and TensorRT for RTX: one API, and what only one of them has.

That is probed, never inferred from a version. Either library is imported on demand and nowhere
else. What goes through TensorRT is written against its API and has never run; no engine of TensorRT
for RTX has run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Variant:
    """An imported TensorRT library.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`; whoever takes a variant imports neither.
        target: `trt` or `rtx`.
        version: The library's version.
        sms: Compute capabilities engines can be built for ahead of time, without a GPU, e.g. 86;
            empty for a library that builds for the GPU at hand.
        runtime_cache: Kernels compiled at first use can be kept in a file.
        capturable: The library says itself whether a stream can be captured into a CUDA graph.
    """

    module: Any
    target: str
    version: str
    sms: tuple[int, ...]
    runtime_cache: bool
    capturable: bool

    @property
    def library(self) -> dict[str, str]:
        """Name and version, as engines are tied to them."""
        return {"name": self.module.__name__, "version": self.version}


def variant_from_module(module: Any) -> Variant:
    """Probes an imported library for what it can do."""
    capability = getattr(module, "ComputeCapability", None)
    names = [n for n in dir(capability) if n.startswith("SM") and n[2:].isdigit()]
    return Variant(
        module=module,
        target="rtx" if capability is not None else "trt",
        version=str(module.__version__),
        sms=tuple(sorted(int(name[2:]) for name in names)),
        runtime_cache=hasattr(module, "IRuntimeCache"),
        capturable=hasattr(getattr(module, "IExecutionContext", None), "is_stream_capturable"),
    )


def load_tensorrt() -> Variant:
    """TensorRT: engines for the GPU at hand.

    ImportError if its bindings are not installed, OSError if they are and the library is not.
    """
    import tensorrt

    return variant_from_module(tensorrt)


def load_tensorrt_rtx() -> Variant:
    """TensorRT for RTX: engines for named compute capabilities, built on any machine.

    ImportError if its bindings are not installed, OSError if they are and the library is not.
    """
    import tensorrt_rtx

    return variant_from_module(tensorrt_rtx)
