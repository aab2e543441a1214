"""A CUDA device for measurements without a GPU: its memory is the host's, a thread copies.

Only what `WeightStore` calls. A copy runs beside the caller, as a copy engine's does, at the speed
of this machine's memory; an event is done when everything enqueued before it is. Memory that is
freed is kept and given out again: a device's memory is there before anything is loaded, so the time
the kernel takes to find pages for it is counted only where `fresh` asks for that.
"""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

__all__ = ["HostDevice"]

_OK = (0,)


class HostDevice:
    """The functions of `cuda.bindings.runtime` that loading weights needs.

    Args:
        memory: Bytes it says it has.
        fresh: Whether every allocation is memory nobody has used yet.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)

    def __init__(self, memory: int, *, fresh: bool = False) -> None:
        self._memory, self._fresh = memory, fresh
        self._blocks: dict[int, mmap.mmap] = {}
        self._kept: dict[int, list[mmap.mmap]] = {}
        self._streams: dict[int, ThreadPoolExecutor] = {}
        self._last: dict[int, Future[Any]] = {}
        self._events: dict[int, Future[Any] | None] = {}
        self._ids = count(1)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return _OK

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self._memory, self._memory

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        kept = self._kept.get(size)
        return 0, self._address(kept.pop() if kept else self._pages(size))

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return 0, self._address(mmap.mmap(-1, size, flags=private))

    def cudaFree(self, address: int) -> tuple[int]:
        block = self._blocks.pop(address)
        if not self._fresh:
            self._kept.setdefault(len(block), []).append(block)
        return _OK

    def cudaFreeHost(self, address: int) -> tuple[int]:
        del self._blocks[address]
        return _OK

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        stream = next(self._ids)
        self._streams[stream] = ThreadPoolExecutor(1, "copy-engine")
        return 0, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self._streams.pop(stream).shutdown()
        self._last.pop(stream, None)
        return _OK

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if stream in self._last:
            self._last[stream].result()
        return _OK

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:
        event = next(self._ids)
        self._events[event] = None
        return 0, event

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        del self._events[event]
        return _OK

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        self._events[event] = self._last.get(stream)
        return _OK

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        last = self._events[event]
        if last is not None:
            last.result()
        return _OK

    def cudaMemcpyAsync(self, target: int, source: int, size: int, *rest: int) -> tuple[int]:
        _, stream = rest
        copy = partial(ctypes.memmove, target, source, size)
        self._last[stream] = self._streams[stream].submit(copy)
        return _OK

    def _pages(self, size: int) -> mmap.mmap:
        """Shared memory, so that it does not count as anonymous memory of this process."""
        block = mmap.mmap(-1, size)
        if not self._fresh:
            for start in range(0, size, mmap.PAGESIZE):
                block[start] = 1
        return block

    def _address(self, block: mmap.mmap) -> int:
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(block))
        self._blocks[address] = block
        return address
