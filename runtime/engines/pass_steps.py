"""The steps of one pass as enqueued: programs, experts, and state copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from twotower.bundle import EngineFile
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer
from twotower.runtime.cuda.device_streams import CudaEvent, CudaStream
from twotower.runtime.device import Array
from twotower.runtime.engines.handover import Handover
from twotower.runtime.engines.kernel_experts import ExpertStep
from twotower.spec import PAST_LENGTH, StateTensor, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundProgram:
    """A program bound to its addresses.

    Attributes:
        takes: What it takes over from the programs and experts before it, in bytes by name.
        close: Frees what was made for it; idempotent.
        may_be_captured: What the library says of a stream, outside a capture.
    """

    part: EngineFile
    device: int
    index: int
    takes: Mapping[str, int]
    enqueue: Callable[[int], None]
    close: Callable[[], None]
    may_be_captured: Callable[[int], bool] = lambda stream: True


class PassSteps:
    """Enqueues the steps of one pass in order; the first is a program."""

    def __init__(
        self,
        cuda: Cuda,
        handover: Mapping[int, Handover],
        bound: Sequence[BoundProgram | ExpertStep],
        *,
        copies: BoundCopies | None = None,
    ) -> None:
        self._cuda, self._handover = cuda, handover
        self._bound, self._copies = list(bound), copies
        self._events: dict[int, CudaEvent] = {}
        self._first = bound[0].device
        devices = dict.fromkeys(b.device for b in bound)
        with Cleanup(self.close) as undo:
            for device in devices if len(devices) > 1 else ():
                self._events[device] = CudaEvent(cuda, device)
            undo.pop_all()

    @property
    def same_every_time(self) -> bool:
        """Whether all runs enqueue the same work: copies of the state depend on the text."""
        return self._copies is None and not self._events

    def may_be_captured(self, queue: CudaStream) -> bool:
        """Whether the library captures every program on a queue."""
        programs = [bound for bound in self._bound if isinstance(bound, BoundProgram)]
        return all(bound.may_be_captured(queue.handles[bound.device]) for bound in programs)

    def enqueue(self, queue: CudaStream) -> None:
        """Enqueues every step on its device's stream; DeviceError if one is refused."""
        at = self._first
        for bound in self._bound:
            device = bound.device
            if device != at:
                assert isinstance(bound, BoundProgram), "experts are where the program before is"
                self._hand_over(queue, bound, at)
                at = device
            self._cuda.use(device)
            bound.enqueue(queue.handles[device])
            if self._copies is not None and isinstance(bound, BoundProgram):
                self._copies.enqueue(bound.part.outputs, queue)

    def close(self) -> None:
        """Frees the steps, then the events; idempotent."""
        events = list(self._events.values())
        self._events.clear()
        steps = [bound.close for bound in self._bound if isinstance(bound, BoundProgram)]
        self._bound.clear()
        close_all((*steps, *(event.close for event in events)))

    def _hand_over(self, queue: CudaStream, bound: BoundProgram, source: int) -> None:
        """Brings what a program reads from the device before it, whose stream is waited for."""
        cuda, device = self._cuda, bound.device
        cuda.use(source)
        self._events[source].record(queue.handles[source])
        cuda.use(device)
        self._events[source].hold(queue.handles[device])
        for name, nbytes in bound.takes.items():
            target = self._handover[device].address(name, bound.index)
            origin = self._handover[source].address(name, bound.index)
            cuda.copy(target, origin, nbytes, stream=queue.handles[device])


class StateCopies:
    """Copies the state the context tower changes to the other devices that read it."""

    def __init__(self, cuda: Cuda, state: Iterable[StateTensor]) -> None:
        self._cuda = cuda
        self._in_place = {t.present.name: t.in_place for t in state}

    def of(
        self, arrays: Mapping[str, DeviceBuffer], sizes: Mapping[str, int]
    ) -> BoundCopies | None:
        """The copies of a pass over these buffers; None where every tensor is on one device."""
        shared = {name: arrays[name] for name in self._in_place if len(arrays[name].addresses) > 1}
        past = arrays[PAST_LENGTH].array
        if not shared or past is None:
            return None
        return BoundCopies(
            self._cuda,
            {name: (buffer, self._in_place[name]) for name, buffer in shared.items()},
            past,
            sizes["L"],
        )


class BoundCopies:
    """The copies of one binding of the context graph.

    Of keys and values only the chunk's own positions travel, row by row and head by head; of the
    Mamba states everything, because everything in them has changed.
    """

    def __init__(
        self, cuda: Cuda, shared: Mapping[str, tuple[DeviceBuffer, bool]], past: Array, width: int
    ) -> None:
        self._cuda, self._shared = cuda, dict(shared)
        self._past, self._width = past, width

    def enqueue(self, written: Iterable[TensorSpec], queue: CudaStream) -> None:
        """Copies those of `written` that are needed elsewhere, on the stream that wrote them."""
        for spec in written:
            if spec.name not in self._shared:
                continue
            buffer, in_place = self._shared[spec.name]
            spans = list(self._chunks(buffer)) if in_place else [(0, buffer.nbytes)]
            (home, source), *others = buffer.addresses.items()
            self._cuda.use(home)
            for _, target in others:
                for at, size in spans:
                    self._cuda.copy(
                        target + at,
                        source + at,
                        size,
                        stream=queue.handles[home],
                    )

    def _chunks(self, buffer: DeviceBuffer) -> Iterable[tuple[int, int]]:
        """Offset and bytes of the chunk in a cache [B, heads, T, size], for each row and head."""
        rows, heads, capacity, size = buffer.shape
        position = size * buffer.itemsize
        for row in range(rows):
            for head in range(heads):
                first = (row * heads + head) * capacity + int(self._past[row])
                yield first * position, self._width * position
