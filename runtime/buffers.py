"""What a batch of rows keeps on a device: the state, shared by both towers in place, and the denoiser's small arrays, bound once."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.runtime.cleanup import Cleanup
from twotower.runtime.device import Buffer, Memory, span_of
from twotower.spec import (
    BLOCK,
    COMMIT_FLOOR,
    CONFIDENCE,
    CONTEXT_LENGTH,
    MASKED_LEFT,
    NEXT_BLOCK,
    NOISE,
    PREDICTED,
    TEMPERATURE,
    THRESHOLD,
    StateTensor,
    TowerSignature,
)

__all__ = ["ContextState", "DenoiserArrays"]

_DENOISER_SMALL = (
    *(BLOCK, CONTEXT_LENGTH, THRESHOLD, COMMIT_FLOOR, TEMPERATURE, NOISE),
    *(NEXT_BLOCK, PREDICTED, CONFIDENCE, MASKED_LEFT),
)


class DenoiserArrays:
    """The denoiser's small inputs and outputs, written and read in place (shapes as in the graph contract).

    Attributes:
        by_name: The buffers behind them under their graph names. They may have more rows than the
            arrays show.
    """

    __slots__ = (
        "_whole",
        "block",
        "by_name",
        "commit_floor",
        "confidence",
        "context_length",
        "masked_left",
        "next_block",
        "noise",
        "predicted",
        "temperature",
        "threshold",
    )

    def __init__(
        self, memory: Memory, signature: TowerSignature, *, rows: int, block_size: int
    ) -> None:
        self.by_name = memory.small(
            [signature.tensor(name) for name in _DENOISER_SMALL], {"B": rows, "S": block_size}
        )
        self._whole = {name: memory.host(buffer) for name, buffer in self.by_name.items()}
        self.use(rows, unmasked=0)

    def use(self, rows: int, *, unmasked: int) -> None:
        """Shows the first rows; the others become padding: a block without masks after no text, nothing to commit.

        Args:
            rows: How many.
            unmasked: A token that is no mask.
        """
        for name, whole in self._whole.items():
            whole[rows:] = unmasked if name == BLOCK else 0
        a = {name: whole[:rows] for name, whole in self._whole.items()}
        self.block, self.context_length = a[BLOCK], a[CONTEXT_LENGTH]
        self.threshold, self.commit_floor = a[THRESHOLD], a[COMMIT_FLOOR]
        self.temperature, self.noise = a[TEMPERATURE], a[NOISE]
        self.next_block, self.predicted = a[NEXT_BLOCK], a[PREDICTED]
        self.confidence, self.masked_left = a[CONFIDENCE], a[MASKED_LEFT]


class ContextState:
    """The context state of some rows.

    Keys and values have one buffer, which the context tower extends in place. Convolution and SSM
    states have two: the context tower reads one set while it writes the other, and then they change
    places. The denoiser reads the set written last. So no state is ever copied, and two bindings of
    each engine cover all cases.

    Args:
        memory: Where it lies.
        tensors: The state by name, dtype and axes.
        rows: B.
        capacity: T.

    Attributes:
        capacity: Positions the keys and values have room for.
        current: Which of the two sets, 0 or 1, holds the state now.
    """

    def __init__(
        self, memory: Memory, tensors: Sequence[StateTensor], *, rows: int, capacity: int
    ) -> None:
        self.capacity = capacity
        self.current = 0
        self._memory = memory
        self._tensors = tuple(tensors)
        self._rows = rows
        self._used = 0
        sizes = {"B": rows, "T": capacity}
        self._fixed: dict[str, Buffer] = {}
        self._moving: tuple[dict[str, Buffer], dict[str, Buffer]] = ({}, {})
        with Cleanup(self.close) as undo:
            for t in tensors:
                for names in (self._fixed,) if t.in_place else self._moving:
                    names[t.past.name] = memory.state(t.past, sizes)
            undo.pop_all()

    def reads(self, which: int) -> dict[str, Buffer]:
        """Set `which` under its input names."""
        return {t.past.name: self._buffer(t, which) for t in self._tensors}

    def writes(self, which: int) -> dict[str, Buffer]:
        """What a context pass that reads set `which` writes: the other set, under its output names."""
        return {t.present.name: self._buffer(t, 1 - which) for t in self._tensors}

    def moved_on(self, end: int) -> None:
        """Notes that the context tower has read a chunk and written keys up to position `end`."""
        self.current = 1 - self.current
        self._used = max(self._used, end)

    def clear(self) -> None:
        """Back to the start of a text.

        Keys are cleared too, as far as they were written: they would be masked, but a masked
        infinity times zero is not a number.
        """
        for tensor in self._tensors:
            if tensor.in_place:
                self._memory.clear(
                    self._fixed[tensor.past.name], span_of(tensor.past, "T", self._used)
                )
            else:
                self._memory.clear(self._moving[0][tensor.past.name])
        self.current = self._used = 0

    def grow(self, capacity: int) -> None:
        """Moves keys and values into larger buffers, or other ones of the same size; whatever is bound to the old ones is let go first.

        Raises:
            RequestError: there is not enough memory.
        """
        assert capacity >= self.capacity
        for tensor in self._tensors:
            if tensor.in_place:
                name = tensor.past.name
                old, larger = (
                    self._fixed[name],
                    self._memory.state(tensor.past, {"B": self._rows, "T": capacity}),
                )
                self._memory.copy(old, larger, span_of(tensor.past, "T", self._used))
                self._fixed[name] = larger
                self._memory.release([old])
        self.capacity = capacity

    def close(self) -> None:
        """Gives the buffers back; whatever is bound to them must be let go first."""
        buffers = [buffer for names in (self._fixed, *self._moving) for buffer in names.values()]
        for names in (self._fixed, *self._moving):
            names.clear()
        self._memory.release(buffers)

    def _buffer(self, tensor: StateTensor, which: int) -> Buffer:
        return (
            self._fixed[tensor.past.name]
            if tensor.in_place
            else self._moving[which][tensor.past.name]
        )
