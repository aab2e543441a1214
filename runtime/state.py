"""What a batch of rows carries from chunk to chunk: keys, values and Mamba states, shared by both towers in place."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.runtime.buffers import allocate
from twotower.runtime.engines.base import Array
from twotower.spec import StateTensor

__all__ = ["ContextState"]


class ContextState:
    """The context state of some rows.

    Keys and values have one buffer, which the context tower extends in place. Convolution and SSM states have two: the context tower
    reads one set while it writes the other, and then they change places. The denoiser reads the set written last. So no state is ever
    copied, and two bindings of each engine cover all cases.

    Args:
        tensors: The state by name, dtype and axes.
        rows: B.
        capacity: T.

    Attributes:
        capacity: Positions the keys and values have room for.
        current: Which of the two sets, 0 or 1, holds the state now.
    """

    def __init__(self, tensors: Sequence[StateTensor], *, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.current = 0
        self._tensors = tuple(tensors)
        self._rows = rows
        self._used = 0
        sizes = {"B": rows, "T": capacity}
        self._fixed = {t.past.name: allocate(t.past, sizes) for t in tensors if t.in_place}
        self._moving = tuple({t.past.name: allocate(t.past, sizes) for t in tensors if not t.in_place} for _ in range(2))

    def reads(self, which: int) -> dict[str, Array]:
        """Set `which` under its input names."""
        return {t.past.name: self._buffer(t, which) for t in self._tensors}

    def writes(self, which: int) -> dict[str, Array]:
        """What a context pass that reads set `which` writes: the other set, under its output names."""
        return {t.present.name: self._buffer(t, 1 - which) for t in self._tensors}

    def moved_on(self, end: int) -> None:
        """Notes that the context tower has read a chunk and written keys up to position `end`."""
        self.current = 1 - self.current
        self._used = max(self._used, end)

    def clear(self) -> None:
        """Back to the start of a text.

        Keys are cleared too, as far as they were written: they would be masked, but a masked infinity times zero is not a number.
        """
        for tensor in self._tensors:
            if tensor.in_place:
                self._used_part(tensor, self._fixed[tensor.past.name])[...] = 0
            else:
                self._moving[0][tensor.past.name].fill(0)
        self.current = self._used = 0

    def grow(self, capacity: int) -> None:
        """Moves keys and values into larger buffers; everything bound to the old ones must be let go first.

        Raises:
            RequestError: there is not enough memory.
        """
        assert capacity > self.capacity
        for tensor in self._tensors:
            if tensor.in_place:
                name = tensor.past.name
                larger = allocate(tensor.past, {"B": self._rows, "T": capacity})
                self._used_part(tensor, larger)[...] = self._used_part(tensor, self._fixed[name])
                self._fixed[name] = larger
        self.capacity = capacity

    def _buffer(self, tensor: StateTensor, which: int) -> Array:
        return self._fixed[tensor.past.name] if tensor.in_place else self._moving[which][tensor.past.name]

    def _used_part(self, tensor: StateTensor, buffer: Array) -> Array:
        """The view of the positions written so far."""
        return buffer[tuple(slice(0, self._used) if axis == "T" else slice(None) for axis in tensor.past.axes)]
