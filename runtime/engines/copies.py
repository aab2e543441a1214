"""Towers on two devices: after the context tower has moved the state on, the denoiser's device gets what changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.device import Array
from twotower.spec import PAST_LENGTH, StateTensor, TensorSpec

__all__ = ["BoundCopies", "StateCopies"]


class StateCopies:
    """Which tensors of the state another device reads.

    Args:
        cuda: The calls.
        state: The state tensors.
    """

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
        self._cuda, self._shared, self._past, self._width = cuda, dict(shared), past, width

    def enqueue(self, written: Iterable[TensorSpec], queue: CudaStream) -> None:
        """Copies those of `written` that are needed elsewhere, on the stream that wrote them."""
        for spec in written:
            if spec.name in self._shared:
                buffer, in_place = self._shared[spec.name]
                spans = list(self._chunks(buffer)) if in_place else [(0, buffer.nbytes)]
                home, *others = buffer.addresses
                self._cuda.use(home)
                for other in others:
                    for start, size in spans:
                        target, source = (
                            buffer.addresses[other] + start,
                            buffer.addresses[home] + start,
                        )
                        self._cuda.copy(target, source, size, stream=queue.handles[home])

    def _chunks(self, buffer: DeviceBuffer) -> Iterable[tuple[int, int]]:
        """Where the chunk lies in a cache [B, heads, T, size]: offset and bytes for each row and head."""
        rows, heads, capacity, size = buffer.shape
        position = size * buffer.itemsize
        for row in range(rows):
            for head in range(heads):
                yield (
                    ((row * heads + head) * capacity + int(self._past[row])) * position,
                    self._width * position,
                )
