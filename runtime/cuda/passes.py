"""One pass of a graph on devices: uploads, engines, downloads, an event; replayed if it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer
from twotower.runtime.cuda.device_streams import CudaEvent, CudaStream
from twotower.runtime.cuda.graphs import capture
from twotower.runtime.device import Stream
from twotower.spec import TowerSignature


@dataclass(frozen=True, slots=True)
class Transfer:
    """A copy between a device and pinned host memory, on a stream of that device."""

    device: int
    target: int
    source: int
    size: int


class ScratchOrder:
    """Orders passes that share the scratch memory and hand-over buffers of a device.

    The loop's own events order the passes of one batch of rows; this orders those of several.
    """

    def __init__(self) -> None:
        self._event: CudaEvent | None = None
        self._queue: CudaStream | None = None

    def begin(self, queue: CudaStream) -> None:
        """Holds a queue back until the last user is done; within one stream no event is needed."""
        if self._event is not None and (self._queue is not queue or len(queue.handles) > 1):
            self._event.hold(queue.handles[queue.first])

    def end(self, queue: CudaStream, event: CudaEvent) -> None:
        self._queue, self._event = queue, event

    def forget(self, event: CudaEvent) -> None:
        """Before an event that has happened is freed."""
        if self._event is event:
            self._event = self._queue = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """What a pass is made of.

    Attributes:
        devices: The devices it runs on, in the order work passes through them.
        enqueue: Puts the engines on a queue.
        capturable: Asked once, outside a capture; False where the work is not the same every time,
            is on several devices, or a library says no.
    """

    name: str
    devices: tuple[int, ...]
    before: tuple[Transfer, ...]
    after: tuple[Transfer, ...]
    enqueue: Callable[[CudaStream], None]
    capturable: Callable[[CudaStream], bool]
    close: Callable[[], None]


class DevicePass:
    """A binding on devices.

    The first run enqueues piece by piece, which also lets a library finish its lazy set-up. The
    second is captured, if the pass can be, and from then on a run is one launch. Nothing is bound,
    allocated or looked up by name in a run.

    Args:
        order: For each device of the pass, shared with every pass that uses the same scratch
            memory.
    """

    def __init__(self, cuda: Cuda, work: PassWork, order: Iterable[ScratchOrder]) -> None:
        self._cuda, self._work, self._order = cuda, work, tuple(order)
        # A device that hands over to the next is done with its part before: the end of the last
        # one's work is the end of all.
        self._last = work.devices[-1]
        with Cleanup(work.close) as undo:
            self._event = CudaEvent(cuda, self._last)
            undo.pop_all()
        self._runs = 0
        self._graph: int | None = None
        self._broken: CudaStream | None = None
        self._closed = False

    @property
    def replayed(self) -> bool:
        """Whether a run is the launch of a captured graph."""
        return self._graph is not None

    def run(self, stream: Stream) -> CudaEvent:
        """Enqueues one pass, see `Binding.run`; DeviceError if it is refused."""
        assert not self._closed, "a closed pass is not run"
        queue = cast(CudaStream, stream)
        last = queue.handles[self._last]
        for order in self._order:
            order.begin(queue)
        if self._runs == 1 and self._work.capturable(queue):
            self._event.wait_done()  # the first run is done before its work is recorded
            self._cuda.use(self._last)
            self._graph = capture(
                self._cuda, last, lambda: self._enqueue(queue), name=self._work.name
            )
        self._broken = queue  # until the event that says what was enqueued is recorded
        if self._graph is not None:
            self._cuda.use(self._last)
            self._cuda.launch(self._graph, stream=last)
        else:
            self._enqueue(queue)
        self._runs += 1
        self._event.record(last)
        self._broken = None
        for order in self._order:
            order.end(queue, self._event)
        return self._event

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for order in self._order:
            order.forget(self._event)
        close_all((self._wait, self._drop_graph, self._work.close, self._event.close))

    def _wait(self) -> None:
        if self._broken is not None:
            # A pass was refused in the middle: its first part is at work, and no event tells of it.
            self._broken.synchronize()
        elif self._runs:
            self._event.wait_done()

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def _enqueue(self, queue: CudaStream) -> None:
        self._copy(self._work.before, queue)
        self._work.enqueue(queue)
        self._copy(self._work.after, queue)

    def _copy(self, transfers: Iterable[Transfer], queue: CudaStream) -> None:
        for t in transfers:
            self._cuda.use(t.device)
            self._cuda.copy(
                t.target,
                t.source,
                t.size,
                stream=queue.handles[t.device],
            )


def uploads(signature: TowerSignature, buffers: Mapping[str, DeviceBuffer]) -> tuple[Transfer, ...]:
    """Copies of a graph's small inputs to every device that reads them, one a slab and device."""
    return _transfers([buffers[spec.name] for spec in signature.inputs], to_device=True)


def downloads(
    signature: TowerSignature, buffers: Mapping[str, DeviceBuffer]
) -> tuple[Transfer, ...]:
    """Copies of a graph's small outputs to the host, one a slab."""
    return _transfers([buffers[spec.name] for spec in signature.outputs], to_device=False)


def _transfers(buffers: Iterable[DeviceBuffer], *, to_device: bool) -> tuple[Transfer, ...]:
    ranges: dict[tuple[int, int], tuple[DeviceBuffer, int, int]] = {}
    for buffer in buffers:
        if buffer.slab is None:
            continue
        for device in buffer.addresses if to_device else (buffer.home,):
            key = (buffer.slab.host, device)
            _, start, end = ranges.get(key, (buffer, buffer.offset, 0))
            ranges[key] = (
                buffer,
                min(start, buffer.offset),
                max(end, buffer.offset + buffer.nbytes),
            )
    out = []
    for (host, device), (buffer, start, end) in ranges.items():
        assert buffer.slab is not None
        there, here = buffer.slab.addresses[device] + start, host + start
        target, source = (there, here) if to_device else (here, there)
        out.append(Transfer(device, target, source, end - start))
    return tuple(out)
