"""The door to TensorRT: engines built on this machine. Written against the API; it has never run."""

from __future__ import annotations

import tensorrt

from twotower.bundle import Bundle
from twotower.flavour import flavour_from_module
from twotower.runtime.cuda.door import load_cuda
from twotower.runtime.engines.tensorrt_open import TensorRTOptions, open_tensorrt
from twotower.runtime.engines.towers import Towers

__all__ = ["open_towers"]


def open_towers(bundle: Bundle, options: TensorRTOptions) -> Towers:
    """Opens the engines; see `open_tensorrt`."""
    return open_tensorrt(bundle, flavour_from_module(tensorrt), load_cuda(), options)
