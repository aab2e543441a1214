"""The door to TensorRT for RTX: engines built ahead of time. No engine of it has run on a GPU yet."""

from __future__ import annotations

import tensorrt_rtx

from twotower.bundle import Bundle
from twotower.flavour import flavour_from_module
from twotower.runtime.cuda.door import load_cuda
from twotower.runtime.engines.tensorrt_open import TensorRTOptions, open_tensorrt
from twotower.runtime.engines.towers import Towers

__all__ = ["open_towers"]


def open_towers(bundle: Bundle, options: TensorRTOptions) -> Towers:
    """Opens the engines; see `open_tensorrt`."""
    return open_tensorrt(bundle, flavour_from_module(tensorrt_rtx), load_cuda(), options)
