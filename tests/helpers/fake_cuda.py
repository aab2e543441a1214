"""A CUDA without a GPU: functions of `cuda.bindings.runtime` and `driver` over host memory.

Streams work as late as they may. Whoever forgets to wait sees old numbers: nothing enqueued has run
until something waits for it, and then only what it had to wait for has. With a seed, work also runs
in between, in a random order. Memory freed twice, work beyond the end of an allocation or on a
stream of another device and an event recorded on another device are errors at once.

As in CUDA, the current device belongs to a thread; a call that a capture forbids fails and breaks
the capture, whose end then gives no graph; and after some errors (`STICKY`) every later call fails
with the same.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.fake_kernels import FakeKernels

__all__ = ["STICKY", "CudaRefusedError", "FakeCuda"]

Op = Callable[[], None]
_OK, _OUT_OF_MEMORY = 0, 2
_UNSUPPORTED, _INVALIDATED, _ISOLATION, _WRONG_THREAD = (
    900,
    901,
    905,
    908,
)  # cudaErrorStreamCapture...

STICKY = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719})
"""Errors after which a process can use the device no more."""


class CudaRefusedError(Exception):
    """A call that fails, with the library's number of the error."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


_FREES = {
    "cudaFree": "_blocks",
    "cudaFreeHost": "_blocks",
    "cudaStreamDestroy": "_streams",
    "cudaEventDestroy": "_events",
    "cudaGraphDestroy": "_graphs",
    "cudaGraphExecDestroy": "_execs",
}
"""Call -> the table of what it frees, by its first argument."""


def _call(act: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the library that does something, unless the call is to fail."""
    name = act.__name__

    @wraps(act)
    def called(self: FakeCuda, *arguments: Any) -> tuple[int, Any]:
        freed = getattr(self, _FREES[name]) if name in _FREES else None
        assert freed is None or arguments[0] in freed, "freed twice, or never made"
        code, answer = self._answer(name, lambda: act(self, *arguments))
        if self.broken and freed is not None:
            freed.pop(arguments[0], None)
        return code, answer

    return called


@dataclass
class _Capture:
    thread: int
    ops: list[Op] = field(default_factory=list)
    broken: bool = False


@dataclass
class _Stream:
    device: int
    ops: list[Op | tuple[int, int]] = field(
        default_factory=list
    )  # work, or (stream, position) to wait for
    done: int = 0
    capture: _Capture | None = None
    aside: int = 0  # a library's own stream beside it
    hidden: bool = False


@dataclass
class _Event:
    device: int
    flags: int
    at: tuple[int, int] | None = None


class _Mode(IntEnum):
    GLOBAL, THREAD_LOCAL, RELAXED = range(3)


class FakeCuda(FakeKernels):
    """The fake.

    Args:
        devices: GPUs.
        memory: Bytes of each.
        seed: None runs work as late as it may; a number also runs some of it in between, in an
            order drawn from it.
        sm: Compute capability of each.

    Attributes:
        calls: Every call by name, in order.
        counts: How often each was made.
        fail: Name of a call -> (number of the call, error code) at which it fails.
        broken: The sticky error that has happened, or 0. What is freed after it counts as freed:
            the library says no, and the end of the process will do it.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = _Mode

    def __init__(
        self, *, devices: int = 1, memory: int = 1 << 34, seed: int | None = None, sm: int = 90
    ) -> None:
        super().__init__(sm=sm)
        self.calls: list[str] = []
        self.counts: Counter[str] = Counter()
        self.fail: dict[str, tuple[int, int]] = {}
        self.broken = _OK
        self._random = None if seed is None else random.Random(seed)
        self._devices, self._memory = devices, memory
        self._local = threading.local()
        self._lock = threading.RLock()
        self._blocks: dict[
            int, tuple[np.ndarray, int | None]
        ] = {}  # address -> memory, device (None: pinned)
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self._graphs: dict[int, list[Op]] = {}
        self._execs: dict[int, tuple[int, list[Op]]] = {}
        self._ids = count(1001)

    # What the tests ask.

    @property
    def current(self) -> int:
        """The calling thread's device; the first, unless it has chosen another."""
        return getattr(self._local, "device", 0)

    @property
    def leaked(self) -> dict[str, int]:
        """What was made and not freed."""
        kinds = {
            "memory": len(self._blocks),
            "streams": sum(not s.hidden for s in self._streams.values()),
            "events": len(self._events),
            "graphs": len(self._graphs) + len(self._execs),
        }
        return {name: number for name, number in kinds.items() if number}

    @property
    def pending(self) -> int:
        """Work that was enqueued and has not run."""
        return sum(len(s.ops) - s.done for s in self._streams.values())

    def device_of(self, address: int, size: int = 1) -> int | None:
        """The device that memory belongs to; None for pinned host memory.

        Raises:
            AssertionError: not all `size` bytes lie in one allocation.
        """
        for start, (block, device) in self._blocks.items():
            if start <= address and address + size <= start + block.nbytes:
                return device
        raise AssertionError(f"{size} bytes at {address:#x} lie in no allocation")

    def capturing(self, stream: int) -> bool:
        return self._streams[stream].capture is not None

    def enqueue(self, stream: int, op: Op) -> None:
        """Puts work on a stream, or into the graph it is captured into."""
        with self._lock:
            if self.broken:
                raise CudaRefusedError(self.broken)
            s = self._streams[stream]
            assert s.device == self.current, (
                f"device {self.current} is current, the stream is of device {s.device}"
            )
            if s.capture is None:
                s.ops.append(op)
                self._drift()
                return
            if s.capture.broken:
                raise CudaRefusedError(_INVALIDATED)
            s.capture.ops.append(op)

    def enqueue_aside(self, stream: int, op: Op) -> None:
        """Puts work on a hidden stream, after what is on a stream and before what comes later."""
        with self._lock:
            s = self._streams[stream]
            if s.capture is not None or self.broken:
                self.enqueue(stream, op)  # a captured graph has the fork and the join in it
                return
            if not s.aside:
                s.aside = self._new(self._streams, _Stream(s.device, hidden=True))
            hidden = self._streams[s.aside]
            hidden.ops += [(stream, len(s.ops)), op]
            s.ops.append((s.aside, len(hidden.ops)))
            self._drift()

    def unsafe(self) -> int:
        """The error of a library's allocation or wait in this thread; it breaks a capture."""
        try:
            self._forbid_in_capture()
        except CudaRefusedError as e:
            return e.code
        return _OK

    # The functions of the library: each returns a tuple that starts with an error code.

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return _OK, 12040

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return _OK, 13050

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return _OK, b"an injected failure"

    def cudaGetLastError(self) -> tuple[int]:
        return (self.broken,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        code, free = self._answer("cudaMemGetInfo", lambda: self._free(self.current))
        return code, free or 0, self._memory

    @_call
    def cudaGetDeviceCount(self) -> int:
        return self._devices

    @_call
    def cudaSetDevice(self, device: int) -> None:
        assert 0 <= device < self._devices
        self._local.device = device

    @_call
    def cudaDeviceEnablePeerAccess(self, other: int, flags: int) -> None:
        assert other != self.current

    @_call
    def cudaMalloc(self, size: int) -> int:
        self._forbid_in_capture()
        if size > self._free(self.current):
            raise CudaRefusedError(_OUT_OF_MEMORY)
        return self._block(size, self.current)

    @_call
    def cudaHostAlloc(self, size: int, flags: int) -> int:
        self._forbid_in_capture()
        return self._block(size, None)

    @_call
    def cudaFree(self, address: int) -> None:
        self._freed(address)

    @_call
    def cudaFreeHost(self, address: int) -> None:
        self._freed(address)

    @_call
    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        self.device_of(target, size), self.device_of(source, size)
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size) and None)

    @_call
    def cudaMemcpy2DAsync(
        self,
        target: int,
        to_pitch: int,
        source: int,
        from_pitch: int,
        width: int,
        rows: int,
        kind: int,
        stream: int,
    ) -> None:
        spans = [(rows - 1) * pitch + width for pitch in (to_pitch, from_pitch)]
        assert self.device_of(target, spans[0]) == self.device_of(source, spans[1]), (
            "rows are copied within a device only"
        )

        def op() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * to_pitch, source + row * from_pitch, width)

        self.enqueue(stream, op)

    @_call
    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        self.device_of(address, size)
        self.enqueue(stream, lambda: ctypes.memset(address, value, size) and None)

    @_call
    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, rows: int, stream: int
    ) -> None:
        self.device_of(address, (rows - 1) * pitch + width)

        def op() -> None:
            for row in range(rows):
                ctypes.memset(address + row * pitch, value, width)

        self.enqueue(stream, op)

    @_call
    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self._new(self._streams, _Stream(self.current))

    @_call
    def cudaStreamDestroy(self, stream: int) -> None:
        self._run(stream, len(self._streams[stream].ops))
        self._streams.pop(self._streams.pop(stream).aside, None)

    @_call
    def cudaStreamSynchronize(self, stream: int) -> None:
        capture = self._streams[stream].capture
        if capture is not None:  # whoever captures: a capture is of the stream
            capture.broken = True
            raise CudaRefusedError(_UNSUPPORTED)
        self._forbid_in_capture()
        self._run(stream, len(self._streams[stream].ops))

    @_call
    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        s, at = self._streams[stream], self._events[event].at
        if s.capture is not None:  # a captured pass waits for nothing outside it
            s.capture.broken = True
            raise CudaRefusedError(_ISOLATION)
        if at is not None:
            s.ops.append(at)

    @_call
    def cudaEventCreateWithFlags(self, flags: int) -> int:
        return self._new(self._events, _Event(self.current, flags))

    @_call
    def cudaEventDestroy(self, event: int) -> None:
        del self._events[event]

    @_call
    def cudaEventRecord(self, event: int, stream: int) -> None:
        s = self._streams[stream]
        assert self._events[event].device == s.device, (
            "an event is recorded on a stream of its own device"
        )
        assert s.capture is None
        self._events[event].at = (stream, len(s.ops))

    @_call
    def cudaEventSynchronize(self, event: int) -> None:
        self._forbid_in_capture()
        at = self._events[event].at
        if at is not None:
            self._run(*at)

    @_call
    def cudaStreamBeginCapture(self, stream: int, mode: _Mode) -> None:
        assert mode is _Mode.THREAD_LOCAL
        self._streams[stream].capture = _Capture(threading.get_ident())

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:
        capture, self._streams[stream].capture = self._streams[stream].capture, None
        assert capture is not None, "no capture was begun"

        def ended() -> int:
            if capture.thread != threading.get_ident():
                raise CudaRefusedError(_WRONG_THREAD)
            if capture.broken:
                raise CudaRefusedError(_INVALIDATED)
            return self._new(self._graphs, capture.ops)

        return self._answer("cudaStreamEndCapture", ended)

    @_call
    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._new(self._execs, (self.current, list(self._graphs[graph])))

    @_call
    def cudaGraphDestroy(self, graph: int) -> None:
        del self._graphs[graph]

    @_call
    def cudaGraphExecDestroy(self, graph: int) -> None:
        del self._execs[graph]

    @_call
    def cudaGraphLaunch(self, graph: int, stream: int) -> None:
        device, ops = self._execs[graph]
        assert device == self._streams[stream].device
        for op in ops:
            self.enqueue(stream, op)

    # How it works.

    def _answer(self, name: str, act: Callable[[], Any]) -> Any:
        """Does what a call does, unless it fails."""
        with self._lock:
            self.calls.append(name)
            self.counts[name] += 1
            number, code = self.fail.get(name, (0, _OK))
            if number == self.counts[name] and not self.broken:
                self.broken = code if code in STICKY else _OK
            else:
                code = self.broken
            if code == _OK:
                try:
                    return _OK, act()
                except CudaRefusedError as e:
                    return e.code, None
            return code, None

    def _forbid_in_capture(self) -> None:
        """What a capture forbids to the thread that captures breaks it; other threads may go on."""
        mine = [
            s.capture
            for s in self._streams.values()
            if s.capture and s.capture.thread == threading.get_ident()
        ]
        for capture in mine:
            capture.broken = True
        if mine:
            raise CudaRefusedError(_UNSUPPORTED)

    def _new(self, where: dict[int, Any], what: Any) -> int:
        number = next(self._ids)
        where[number] = what
        return number

    def _block(self, size: int, device: int | None) -> int:
        whole = np.full(size + 256, 0xA5, np.uint8)  # memory nobody cleared holds anything
        address = -(-whole.ctypes.data // 256) * 256
        start = address - whole.ctypes.data
        self._blocks[address] = (whole[start : start + size], device)
        return address

    def _freed(self, address: int) -> None:
        self._forbid_in_capture()
        for number, stream in self._streams.items():
            self._run(number, len(stream.ops))  # as the library does: freeing waits for the device
        block, _ = self._blocks.pop(address)
        block.fill(0xEE)

    def _free(self, device: int) -> int:
        return self._memory - sum(
            block.nbytes for block, where in self._blocks.values() if where == device
        )

    def _run(self, stream: int, upto: int) -> None:
        """Runs a stream's work up to a position, and of other streams only what it waits for."""
        s = self._streams.get(stream)
        while s is not None and s.done < upto:
            op = s.ops[s.done]
            s.done += 1
            if isinstance(op, tuple):
                self._run(*op)
            else:
                op()

    def _drift(self) -> None:
        """Sometimes runs a piece of some stream's work, as a device would."""
        while self._random is not None and self._random.random() < 0.5:
            stream = self._random.choice(list(self._streams))
            s = self._streams[stream]
            op = s.ops[s.done] if s.done < len(s.ops) else None
            if op is None or (
                isinstance(op, tuple)
                and op[0] in self._streams
                and self._streams[op[0]].done < op[1]
            ):
                return  # nothing, or it is waiting
            self._run(stream, s.done + 1)
