"""What the loop asks of an engine: one compiled graph, bound to buffers and run on a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from twotower.runtime.device import Event, Stream
from twotower.spec import TowerSignature


class Binding(Protocol):
    """Fixed addresses and shapes for one engine, made once so that a run looks nothing up."""

    def run(self, stream: Stream) -> Event:
        """Enqueues one execution on `stream`; returns its event. A host engine runs at once."""
        ...

    def close(self) -> None:
        """Frees what was made for it; nothing of it may be running. Idempotent."""
        ...


class TowerEngine(Protocol):
    """One graph of the contract, compiled for one target.

    A Protocol: the torch reference in `twotower.model` satisfies it without importing the runtime,
    so the shipped loop is tested against the reference mathematics.
    """

    @property
    def signature(self) -> TowerSignature:
        """Inputs and outputs by name."""
        ...

    def bind(self, arrays: Mapping[str, Any]) -> Binding:
        """Fixes the buffers of every input and output.

        Args:
            arrays: A buffer of the towers' memory for every name in the signature; on the host a
                C-contiguous array. An in-place state has the same buffer under its `past` and its
                `present` name. The buffers must outlive the binding.
        """
        ...

    def close(self) -> None:
        """Frees the engine; idempotent."""
        ...
