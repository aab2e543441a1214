"""The door to TensorRT for RTX: engines for named compute capabilities, built on any machine."""

from __future__ import annotations

import tensorrt_rtx

from twotower.builders.tensorrt_builder import TensorRTBuilder
from twotower.flavour import flavour_from_module

__all__ = ["make_builder"]


def make_builder() -> TensorRTBuilder:
    """The builder of target `rtx`."""
    return TensorRTBuilder(flavour_from_module(tensorrt_rtx))
