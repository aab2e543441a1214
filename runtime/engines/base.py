"""What the loop asks of an engine: one compiled graph, bound to fixed buffers and run on a stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from twotower.config import ModelConfig
from twotower.runtime.streams import Event, Stream
from twotower.spec import TowerSignature

__all__ = ["Binding", "TowerEngine", "Towers"]

Array = np.ndarray[Any, np.dtype[Any]]


class Binding(Protocol):
    """Fixed addresses and shapes for one engine: made once, run many times.

    Making it is the expensive half (name look-ups, shape checks, address tables), so that a step does none of it.
    """

    def run(self, stream: Stream) -> Event:
        """Enqueues one execution on `stream` and returns the event of its completion; a host engine runs at once."""
        ...


class TowerEngine(Protocol):
    """One graph of the contract, compiled for one target.

    A Protocol and not a base class: the torch reference in `twotower.model` satisfies it without importing the
    runtime, which is how the very loop that ships is tested against the reference mathematics.
    """

    @property
    def signature(self) -> TowerSignature:
        """Inputs and outputs by name."""
        ...

    def bind(self, arrays: Mapping[str, Array]) -> Binding:
        """Fixes the buffers of every input and output.

        Args:
            arrays: A C-contiguous buffer for every name in the signature. An in-place state has the same buffer under
                its `past` and its `present` name. The buffers must outlive the binding.
        """
        ...

    def close(self) -> None:
        """Frees the engine; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Towers:
    """The three engines of one opened bundle.

    Attributes:
        config: The model they compute.
        dtype: Element type of keys, values, convolution state and hidden vectors in their buffers.
    """

    config: ModelConfig
    dtype: str
    context: TowerEngine
    context_head: TowerEngine
    denoiser: TowerEngine

    def close(self) -> None:
        """Closes every engine, also when one of them fails to."""
        with ExitStack() as stack:
            for engine in (self.context, self.context_head, self.denoiser):
                stack.callback(engine.close)
