"""Streams and events as values: which work waits for which, on a GPU or on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from twotower.runtime.cleanup import close_all

__all__ = ["Event", "HostStream", "Stream", "Streams"]


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
    """The two queues of a session: the context tower's and the denoiser's; host streams unless told otherwise."""

    context: Stream = field(default_factory=HostStream)
    denoiser: Stream = field(default_factory=HostStream)

    def close(self) -> None:
        """Ends both."""
        close_all((self.context.close, self.denoiser.close))
