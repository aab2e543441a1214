"""The CUDA calls of generation, checked on a GPU without any engine: copies, capture, replay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from statistics import median

import numpy as np

from twotower.doctor.checks import CheckResult
from twotower.errors import DeviceError
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_streams import CudaEvent, CudaStream
from twotower.runtime.cuda.graphs import capture

_SIZE = 1 << 20
_TIMES = 5


class _Bench:
    """Two streams, an event, two blocks of device memory and a pinned one, until `undo` ends."""

    def __init__(self, cuda: Cuda, size: int, undo: ExitStack) -> None:
        self.cuda, self.size = cuda, size
        cuda.use(0)
        self.first = undo.enter_context(closing(CudaStream(cuda, (0,))))
        self.second = undo.enter_context(closing(CudaStream(cuda, (0,))))
        self.event = undo.enter_context(closing(CudaEvent(cuda, 0)))
        self.a = cuda.allocate(size)
        undo.callback(cuda.free, self.a)
        self.b = cuda.allocate(size)
        undo.callback(cuda.free, self.b)
        self.host = cuda.allocate_pinned(size)
        undo.callback(cuda.free_pinned, self.host)
        self.seen = np.frombuffer(cuda.bytes_at(self.host, size), np.uint8)


def check_cuda(cuda: Cuda) -> Iterator[CheckResult]:
    """Checks of GPU 0 through the runtime's own calls.

    DeviceError if a call failed that must not; the process's CUDA is then of no more use.
    """
    with ExitStack() as undo:
        on = _Bench(cuda, _SIZE, undo)
        yield _ordered(on)
        yield from _replayed(on)
        yield _refused(on)


def copy_rates(cuda: Cuda, *, size: int = 1 << 30) -> dict[str, float]:
    """Gigabytes a second of large copies on GPU 0, each the median of five; `size` in bytes.

    `within the device` counts bytes read and written; `to the device` and `to the host` go from and
    to pinned memory.
    """
    with ExitStack() as undo:
        on = _Bench(cuda, size, undo)
        ways = {
            "within the device": (on.b, on.a, 2),
            "to the device": (on.a, on.host, 1),
            "to the host": (on.host, on.b, 1),
        }
        return {
            name: counted * size / _seconds(on, target, source) / 1e9
            for name, (target, source, counted) in ways.items()
        }


def _seconds(on: _Bench, target: int, source: int) -> float:
    """The median time of a copy by the wall clock, waited for; one more before is not counted."""
    times = []
    for _ in range(_TIMES + 1):
        started = time.perf_counter()
        on.cuda.copy(
            target,
            source,
            on.size,
            stream=on.first.handles[0],
        )
        on.first.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _pattern(divisor: int) -> np.ndarray:
    return (np.arange(_SIZE) % divisor).astype(np.uint8)


def _ordered(on: _Bench) -> CheckResult:
    """Up on one stream, across on another that waits for an event, and down."""
    cuda, one, two = on.cuda, on.first.handles[0], on.second.handles[0]
    on.seen[:] = wanted = _pattern(251)
    cuda.copy(on.a, on.host, on.size, stream=one)
    on.event.record(one)
    on.second.wait(on.event)
    cuda.copy(on.b, on.a, on.size, stream=two)
    on.second.synchronize()
    on.seen[:] = 0
    cuda.copy(on.host, on.b, on.size, stream=two)
    on.second.synchronize()
    same = int((on.seen == wanted).sum())
    return CheckResult(
        "copies on two streams in the order of an event",
        same == on.size,
        f"{same} of {on.size} bytes",
    )


def _replayed(on: _Bench) -> Iterator[CheckResult]:
    """A captured graph of three copies reads what is there when it is replayed."""
    cuda, stream = on.cuda, on.first.handles[0]

    def work() -> None:
        cuda.copy(on.a, on.host, on.size, stream=stream)
        cuda.copy_rows(
            (on.b, 512),
            (on.a, 1024),
            (1024, 256),
            stream=stream,
        )
        cuda.copy(on.host, on.b, on.size, stream=stream)

    work()
    on.first.synchronize()
    graph = capture(cuda, stream, work, name="three copies")
    yield CheckResult(
        "copies are captured as a graph", graph is not None, "three copies, one of rows"
    )
    if graph is None:
        return
    try:
        on.seen[:] = given = _pattern(241)
        cuda.launch(graph, stream=stream)
        on.first.synchronize()
        rows = on.seen.reshape(2048, 512)[:1024, :256]
        right = bool((rows == given.reshape(1024, 1024)[:, :256]).all())
    finally:
        cuda.destroy_graph(graph)
    yield CheckResult("a replayed graph reads what is there then", right, "rows of 256 bytes")


def _refused(on: _Bench) -> CheckResult:
    """A capture that a forbidden wait breaks leaves no graph, and a stream that works."""
    cuda, stream = on.cuda, on.first.handles[0]
    name = "a broken capture leaves the stream usable"
    graph = capture(
        cuda,
        stream,
        lambda: cuda.synchronize(stream),
        name="a forbidden wait",
    )
    if graph is not None:
        cuda.destroy_graph(graph)
        return CheckResult(name, False, "waiting inside a capture was not refused")
    on.seen[:] = wanted = _pattern(239)
    try:
        cuda.copy(on.a, on.host, on.size, stream=stream)
        on.first.synchronize()
        on.seen[:] = 0
        cuda.copy(on.host, on.a, on.size, stream=stream)
        on.first.synchronize()
    except DeviceError as e:
        return CheckResult(name, False, f"{e.what}: {e.found}")
    return CheckResult(
        name,
        bool((on.seen == wanted).all()),
        "copies up and down after it",
    )
