"""Timing on a GPU with torch: medians by events, captured graphs, what a card can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from twotower.doctor import SkipSectionError

__all__ = [
    "captured",
    "copy_gb_per_s",
    "median_ms",
    "need_torch",
    "product_tflops",
    "read_gb_per_s",
]

_GIB = 1 << 30
_LEAST_RUNS = 3


def need_torch() -> Any:
    """The module torch on a GPU, with float32 products in float32.

    Raises:
        SkipSectionError: it is not installed, or sees no GPU.
    """
    try:
        import torch
    except ImportError as e:
        raise SkipSectionError(f"torch is not installed ({e})") from e
    if not torch.cuda.is_available():
        raise SkipSectionError(f"torch {torch.__version__} sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch


def median_ms(torch: Any, run: Callable[[], Any], *, most: int = 30, seconds: float = 2.0) -> float:
    """Median milliseconds of `run` between two events, after two runs that are not counted."""
    run()
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < most and (len(times) < _LEAST_RUNS or time.monotonic() < end):
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        done.record()
        done.synchronize()
        times.append(begin.elapsed_time(done))
    return median(times)


def captured(torch: Any, enqueue: Callable[[], None]) -> Any:
    """A CUDA graph of what `enqueue` launches, after one run outside a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        enqueue()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    return graph


def copy_gb_per_s(torch: Any, size: int = 2 * _GIB) -> float:
    """Bytes read and written by a copy in device memory."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return float(2 * size / median_ms(torch, lambda: target.copy_(source)) / 1e6)


def read_gb_per_s(torch: Any, size: int = 2 * _GIB) -> float:
    """Bytes read by a sum of float32."""
    numbers = torch.rand(size // 4, device="cuda")
    return float(size / median_ms(torch, numbers.sum) / 1e6)


def product_tflops(torch: Any, width: int = 8192) -> float:
    """Operations of a square bfloat16 product of random numbers: zeros would run faster."""
    a, b = (torch.randn(width, width, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return float(2 * width**3 / median_ms(torch, lambda: a @ b) / 1e9)
