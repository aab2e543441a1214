"""Engines of TensorRT and TensorRT for RTX from a bundle's graphs: the library is a value, the rest is the same."""

from __future__ import annotations

from twotower.builders.base import BuildConfig
from twotower.builders.expert_code import Compile
from twotower.builders.trt.build_plan import TensorRTPlan
from twotower.bundle import Bundle
from twotower.hardware import probe_machine
from twotower.tensorrt_library import Flavour

__all__ = ["TensorRTBuilder"]


class TensorRTBuilder:
    """Builds the targets `rtx` and `trt`.

    Args:
        flavour: The library.
        compiler: What compiles the kernels of experts; None for Triton, which may be missing.
    """

    def __init__(self, flavour: Flavour, compiler: Compile | None = None) -> None:
        self.flavour, self._compiler = flavour, compiler

    def library(self) -> dict[str, str]:
        return self.flavour.library

    def plan(self, bundle: Bundle, config: BuildConfig) -> TensorRTPlan:
        """What a build would make, for this machine as it is now."""
        return TensorRTPlan(bundle, config, flavour=self.flavour, compiler=self._compiler, machine=probe_machine())
