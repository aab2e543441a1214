"""CUDA streams and events as the loop uses them, on one device or several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.device import Event, HostStream


class CudaEvent:
    """A re-recordable point in a stream's work; waiting covers the later recording too.

    It is closed only after it was waited for, so waiting for a closed one returns at once.
    """

    def __init__(self, cuda: Cuda, device: int) -> None:
        self.device = device
        self._cuda = cuda
        cuda.use(device)
        self._handle = cuda.create_event()

    def record(self, stream: int) -> None:
        """Marks what has been enqueued on a stream of the event's own device so far."""
        self._cuda.record(self._handle, stream=stream)

    def wait_done(self) -> None:
        if self._handle:
            self._cuda.wait_event(self._handle)

    def hold(self, stream: int) -> None:
        """Lets later work of a stream, of any device, wait for this."""
        if self._handle:
            self._cuda.stream_waits(stream, self._handle)

    def close(self) -> None:
        """Frees the event; idempotent."""
        handle, self._handle = self._handle, 0
        if handle:
            self._cuda.destroy_event(handle)


class CudaStream:
    """The queue of one tower: a CUDA stream on each of its devices, joined by events.

    Args:
        devices: In the order work passes through them. What the queue waits for holds back the
            first, and so everything after it.
    """

    def __init__(self, cuda: Cuda, devices: Sequence[int]) -> None:
        self._cuda = cuda
        self.first = devices[0]
        self.handles: dict[int, int] = {}
        with Cleanup(self.close) as undo:
            for device in dict.fromkeys(devices):
                cuda.use(device)
                self.handles[device] = cuda.create_stream()
            undo.pop_all()

    def wait(self, event: Event) -> None:
        if event is not HostStream.done:
            cast(CudaEvent, event).hold(self.handles[self.first])

    def synchronize(self) -> None:
        """Blocks until everything enqueued is done."""
        for handle in self.handles.values():
            self._cuda.synchronize(handle)

    def close(self) -> None:
        handles = list(self.handles.values())
        self.handles.clear()
        close_all(partial(self._cuda.destroy_stream, handle) for handle in handles)
