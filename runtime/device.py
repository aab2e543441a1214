"""Device abstraction of the loop: buffers, streams and events.

Of buffers on devices the loop sees only the small arrays it writes and reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from twotower.dtypes import carried_dtype
from twotower.errors import RequestError
from twotower.runtime.cleanup import close_all
from twotower.spec import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]

Buffer = Any
"""What a `Memory` gives out and its engines take: an array on the host, addresses on a device."""


@dataclass(frozen=True, slots=True)
class Span:
    """Positions `start` to `stop` along one axis, and everything along the others."""

    axis: int
    start: int
    stop: int

    @property
    def index(self) -> tuple[slice, ...]:
        """The same for NumPy."""
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))


class Memory(Protocol):
    """Allocates, clears and copies the buffers of a session, on any backend.

    Clearing and copying happen between runs and are done when they return.
    """

    def state(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Buffer:
        """A zeroed buffer only engines use; RequestError without enough memory."""
        ...

    def small(self, specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Buffer]:
        """Zeroed buffers by name that the host writes or reads around every pass.

        On a device they travel in one copy. Raises RequestError if there is not enough memory.
        """
        ...

    def host(self, buffer: Buffer) -> Array:
        """The host's side of a small buffer."""
        ...

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        """The beginning of a buffer in another shape; it shares the memory."""
        ...

    def clear(self, buffer: Buffer, span: Span | None = None) -> None:
        """Zeros in all of a buffer or in a span of it."""
        ...

    def copy(self, source: Buffer, target: Buffer, span: Span) -> None:
        """Copies a span to the same place of another buffer, which may be longer there."""
        ...

    def release(self, buffers: Sequence[Buffer]) -> None:
        """Gives buffers back; one that was given back already is passed over."""
        ...

    def close(self) -> None:
        """Gives everything back; idempotent."""
        ...


class HostMemory:
    """NumPy arrays, which engines on the host use where they are."""

    def state(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        try:
            return np.zeros(spec.shape(sizes), carried_dtype(spec.dtype))
        except MemoryError as e:
            raise no_memory(spec, sizes) from e

    def small(self, specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Array]:
        return {spec.name: self.state(spec, sizes) for spec in specs}

    def host(self, buffer: Array) -> Array:
        return buffer

    def view(self, buffer: Array, shape: tuple[int, ...]) -> Array:
        return buffer.reshape(-1)[: int(np.prod(shape))].reshape(shape)

    def clear(self, buffer: Array, span: Span | None = None) -> None:
        buffer[span.index if span else ...] = 0

    def copy(self, source: Array, target: Array, span: Span) -> None:
        target[span.index] = source[span.index]

    def release(self, buffers: Sequence[Array]) -> None:
        return

    def close(self) -> None:
        return


def span_of(spec: TensorSpec, axis: str, stop: int) -> Span:
    """The positions below `stop` of an axis given by its letter."""
    return Span(spec.axes.index(axis), 0, stop)


def no_memory(spec: TensorSpec, sizes: Mapping[str, int], free: str = "") -> RequestError:
    """The error of a buffer that cannot be allocated; `free` describes the memory left."""
    need = int(np.prod(spec.shape(sizes), dtype=object)) * carried_dtype(spec.dtype).itemsize
    return RequestError(
        f"not enough memory for {sizes.get('B', 1)} row(s) at a context capacity of "
        f"{sizes.get('T', 0)} tokens",
        found=f"{spec.name} alone needs {need:,} bytes" + (f"; {free}" if free else ""),
        do="lower max_batch, shorten the prompt, or lower max_new_tokens",
    )


class Event(Protocol):
    """A point in a stream's work."""

    def wait_done(self) -> None:
        """Blocks the caller until the work before this event has finished."""
        ...


class Stream(Protocol):
    """A queue of device work."""

    def wait(self, event: Event) -> None:
        """Makes later work on this stream wait for `event`, without blocking the caller."""
        ...

    def close(self) -> None:
        """Ends the stream after its work; idempotent."""
        ...


class _Done:
    """The event of work that has already finished."""

    def wait_done(self) -> None:
        return


class HostStream:
    """The stream of an engine that computes when it is called: everything before now is done."""

    done: Event = _Done()

    def wait(self, event: Event) -> None:
        event.wait_done()

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class Streams:
    """The two queues of a session; host streams unless told otherwise."""

    context: Stream = field(default_factory=HostStream)
    denoiser: Stream = field(default_factory=HostStream)

    def close(self) -> None:
        """Ends both."""
        close_all((self.context.close, self.denoiser.close))
