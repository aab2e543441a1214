"""Named host buffers of a batch: allocated once, and two sets where an engine cannot write over what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from twotower.config import ModelConfig
from twotower.errors import RequestError
from twotower.spec import StateTensor, TensorSpec, state_tensors

__all__ = ["Array", "StateBuffers", "allocate"]

Array = np.ndarray[Any, np.dtype[Any]]
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64}  # numpy has no bfloat16: its bits


def allocate(specs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Array]:
    """A zeroed buffer for every tensor.

    Raises:
        RequestError: there is no memory for them.
    """
    specs = tuple(specs)
    try:
        return {s.name: np.zeros(s.shape(sizes), _DTYPES[s.dtype]) for s in specs}
    except MemoryError as e:
        needed = sum(int(np.prod(s.shape(sizes))) * np.dtype(_DTYPES[s.dtype]).itemsize for s in specs)
        raise RequestError(
            "there is not enough memory for the state of this batch",
            found=f"{needed / 1e9:.2f} GB wanted for {dict(sizes)}",
            do="use a smaller --max-batch or a shorter text",
        ) from e


class StateBuffers:
    """The context state of a batch: keys and values once, conv and SSM states twice.

    Args:
        config: The model.
        dtype: Element type of keys, values and conv state.
        rows: B.
        capacity: T.
    """

    def __init__(self, config: ModelConfig, dtype: str, *, rows: int, capacity: int) -> None:
        self._tensors = state_tensors(config, dtype)
        self.rows, self.capacity = rows, capacity
        self._shared = allocate((s.past for s in self._in_place()), self._sizes())
        self._pair = tuple(allocate((s.past for s in self._tensors if not s.in_place), self._sizes()) for _ in range(2))

    def inputs(self, parity: int) -> dict[str, Array]:
        """Buffers under their input names; `parity` says which of the two sets is current."""
        return {**self._shared, **self._pair[parity]}

    def outputs(self, parity: int) -> dict[str, Array]:
        """Buffers under their output names: the other set of a pair, the same buffer where it is updated in place."""
        after = self.inputs(1 - parity)
        return {s.present.name: after[s.past.name] for s in self._tensors}

    def clear(self) -> None:
        """The state before the first token. Keys and values too: a NaN left there would outlive its mask (0 x NaN is NaN)."""
        for array in (*self._shared.values(), *self._pair[0].values(), *self._pair[1].values()):
            array.fill(0)

    def grow(self, capacity: int, used: int) -> None:
        """Moves the keys and values into longer buffers; the first `used` slots are kept."""
        old, self.capacity = self._shared, capacity
        self._shared = allocate((s.past for s in self._in_place()), self._sizes())
        for name, array in old.items():
            self._shared[name][:, :, :used] = array[:, :, :used]

    def _in_place(self) -> list[StateTensor]:
        return [s for s in self._tensors if s.in_place]

    def _sizes(self) -> dict[str, int]:
        return {"B": self.rows, "T": self.capacity}
