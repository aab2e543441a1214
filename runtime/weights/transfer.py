"""From files to devices: threads read into a ring of pinned memory while copies leave it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_streams import CudaEvent
from twotower.runtime.weights.data_file import DataFile
from twotower.runtime.weights.device_layout import Chunk
from twotower.weights.refs import PAGE


@dataclass(frozen=True, slots=True)
class DeviceCopy:
    """A part of a chunk on its way to an address of one device."""

    device: int
    address: int
    source: int
    size: int


@dataclass(frozen=True, slots=True)
class Step:
    """A chunk of a file and where its parts go."""

    file: DataFile
    chunk: Chunk
    copies: tuple[DeviceCopy, ...]


@dataclass(frozen=True, slots=True)
class Ring:
    """The pinned memory chunks pass through.

    Attributes:
        slots: Chunks in memory: read, being read, or being copied.
        slot_bytes: Bytes of a chunk at most, a multiple of `PAGE`.
    """

    threads: int = 4
    slots: int = 16
    slot_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if not 1 <= self.threads < self.slots or self.slot_bytes < PAGE or self.slot_bytes % PAGE:
            raise ValueError(f"not a ring: {self}")


@dataclass(slots=True, eq=False)
class _Slot:
    """A place of the ring; an event a device says when it may be read into again."""

    address: int
    view: memoryview
    events: dict[int, CudaEvent] = field(default_factory=dict)
    waits: list[CudaEvent] = field(default_factory=list)
    hashing: Future[None] | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """Brings chunks to devices; `open_transfer` makes one.

    The caller's thread makes all CUDA calls; others only read and hash. Chunks are taken in order,
    so that a hash can follow: one thread for each file that is hashed, as SHA-256 of one file is a
    chain.
    """

    cuda: Cuda
    streams: Mapping[int, int]
    free: list[_Slot]
    readers: ThreadPoolExecutor
    hashers: Mapping[DataFile, ThreadPoolExecutor]
    ahead: int

    def run(self, steps: Iterator[Step], *, tick: Callable[[int], None]) -> None:
        """Reads and copies every chunk in order; `tick` gets the bytes of each that arrived.

        A file that is hashed is read whole, in order. Raises BundleError for an unreadable or short
        file, DeviceError for a failed copy.
        """
        reading: deque[tuple[Step, _Slot, Future[None]]] = deque()
        leaving: deque[tuple[Step, _Slot]] = deque()
        while True:
            while self.free and (step := next(steps, None)) is not None:
                slot = self.free.pop()
                read = self.readers.submit(
                    step.file.read,
                    step.chunk,
                    slot.view,
                )
                reading.append((step, slot, read))
            if reading:
                step, slot, read = reading.popleft()
                read.result()
                self._send(step, slot)
                leaving.append((step, slot))
            elif not leaving:
                return
            # As long as every reader has a chunk ahead, slots may take their time to leave.
            if leaving and len(reading) < self.ahead:
                step, slot = leaving.popleft()
                self._left(slot)
                tick(step.chunk.stop - step.chunk.start)

    def _send(self, step: Step, slot: _Slot) -> None:
        """Enqueues what goes to devices, and the hashing beside it."""
        for copy in step.copies:
            self.cuda.use(copy.device)
            stream = self.streams[copy.device]
            self.cuda.copy(
                copy.address,
                slot.address + copy.source,
                copy.size,
                stream=stream,
            )
        for device in dict.fromkeys(copy.device for copy in step.copies):
            self.cuda.use(device)
            slot.events[device].record(self.streams[device])
            slot.waits.append(slot.events[device])
        hasher = self.hashers.get(step.file)
        if hasher is not None:
            size = step.chunk.stop - step.chunk.start
            slot.hashing = hasher.submit(step.file.hash, slot.view[:size])

    def _left(self, slot: _Slot) -> None:
        """Waits until nothing needs a slot's content any more, and gives it back."""
        while slot.waits:
            slot.waits.pop().wait_done()
        if slot.hashing is not None:
            slot.hashing.result()
            slot.hashing = None
        self.free.append(slot)


@contextmanager
def open_transfer(
    cuda: Cuda,
    devices: Sequence[int],
    ring: Ring,
    *,
    hashed: Iterable[DataFile] = (),
) -> Iterator[Transfer]:
    """A transfer to devices; its end waits for the last read and copy and frees all.

    Files in `hashed` are hashed while they are read. Raises DeviceError if resources are lacking.
    """
    interrupts: list[KeyboardInterrupt] = []
    with Cleanup() as undo:
        streams: dict[int, int] = {}
        for device in devices:
            cuda.use(device)
            streams[device] = cuda.create_stream()
            undo.callback(partial(cuda.destroy_stream, streams[device]))
        slots = [_Slot(address, view) for address, view in _pinned(cuda, ring, undo)]
        for device in devices:
            for slot in slots:
                slot.events[device] = CudaEvent(cuda, device)
                undo.callback(slot.events[device].close)
        for stream in streams.values():
            undo.callback(partial(cuda.synchronize, stream))
        readers = ThreadPoolExecutor(ring.threads, "read-weights")
        hashers = {file: ThreadPoolExecutor(1, "hash-weights") for file in hashed}
        for pool in (*hashers.values(), readers):
            undo.callback(partial(_end_threads, pool, interrupts))
        yield Transfer(cuda, streams, slots, readers, hashers, ring.threads)
    if interrupts:
        raise interrupts[0]


def _pinned(cuda: Cuda, ring: Ring, undo: Cleanup) -> Iterator[tuple[int, memoryview]]:
    """Address and memory of every slot, each on a page of its own."""
    size = ring.slot_bytes
    whole = ring.slots * size + PAGE
    address = cuda.allocate_pinned(whole)
    undo.callback(partial(cuda.free_pinned, address))
    memory = np.frombuffer(cuda.bytes_at(address, whole), np.uint8).data
    first = -address % PAGE
    for start in range(first, first + ring.slots * size, size):
        yield address + start, memory[start : start + size]


def _end_threads(pool: ThreadPoolExecutor, interrupts: list[KeyboardInterrupt]) -> None:
    """Waits for what has begun, as it uses the ring; an interrupt meanwhile is kept for later."""
    ended = False
    while not ended:
        try:
            pool.shutdown(wait=True, cancel_futures=True)
            ended = True
        except KeyboardInterrupt as e:
            interrupts.append(e)
