"""The door to TensorRT: engines for the GPU at hand. Written against the API; it has never run."""

from __future__ import annotations

import tensorrt

from twotower.builders.tensorrt_builder import TensorRTBuilder
from twotower.flavour import flavour_from_module

__all__ = ["make_builder"]


def make_builder() -> TensorRTBuilder:
    """The builder of target `trt`."""
    return TensorRTBuilder(flavour_from_module(tensorrt))
