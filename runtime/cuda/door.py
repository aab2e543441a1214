"""The door to CUDA: the one module that imports NVIDIA's bindings."""

from __future__ import annotations

from cuda.bindings import driver, runtime

from twotower.runtime.cuda.calls import Cuda

__all__ = ["load_cuda"]


def load_cuda() -> Cuda:
    """The CUDA calls; importing them needs no driver, the first call does."""
    return Cuda(runtime, driver=driver)
