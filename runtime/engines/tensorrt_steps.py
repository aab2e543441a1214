"""The steps of one pass, programs and the experts between them, as they are enqueued one after another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from twotower.errors import DeviceError
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.streams import CudaEvent, CudaStream
from twotower.runtime.engines.experts import BoundExperts
from twotower.runtime.engines.handover import Handover
from twotower.runtime.engines.tensorrt_plan import Execution, Plan, PlanLoader

__all__ = ["ExpertsRun", "ProgramRun", "StepsRoom", "StepsRun"]

logger = logging.getLogger(__name__)


class StepsRoom(Protocol):
    """What running steps needs of what engines share; see `EngineRoom`."""

    cuda: Cuda
    loader: PlanLoader
    handover: dict[int, Handover]
    uncapturable: set[str]

    def keep_kernels(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """A program ready to run.

    Attributes:
        execution: Its context.
        index: Its number in its tower.
        takes: What it takes over from the programs and experts before it, in bytes by name.
        loader: Where the library's words are.
    """

    execution: Execution
    index: int
    takes: Mapping[str, int]
    loader: PlanLoader

    @property
    def plan(self) -> Plan:
        return self.execution.plan

    @property
    def context(self) -> Any:
        return self.execution.context

    @property
    def device(self) -> int:
        return self.plan.device

    def enqueue(self, stream: int) -> None:
        """Puts it on a stream of its device, which is current.

        Raises:
            DeviceError: the library refuses.
        """
        if not self.context.execute_async_v3(stream):
            said = self.loader.drain()
            raise DeviceError(
                f"{self.plan.part.file} was not run",
                found="the library refused to enqueue it" + (f": {said}" if said else ""),
                do="run `twotower doctor BUNDLE`; an engine that was built for another GPU fails like this",
            )

    def close(self) -> None:
        """Frees the context; idempotent."""
        self.execution.close()


@dataclass(frozen=True, slots=True)
class ExpertsRun:
    """The experts after a program, ready to run on that program's device."""

    bound: BoundExperts
    device: int

    def enqueue(self, stream: int) -> None:
        """See `BoundExperts.enqueue`."""
        self.bound.enqueue(stream)

    def close(self) -> None:
        """Frees what was made for them; idempotent."""
        self.bound.close()


class StepsRun:
    """Enqueues the steps of one pass.

    Args:
        room: What they share with other passes.
        bound: The steps in order; the first is a program.
        copies: Brings what they write of the state to other devices; None where there are none.
    """

    def __init__(self, room: StepsRoom, bound: Sequence[ProgramRun | ExpertsRun], copies: Any) -> None:
        self._room, self._bound, self._copies = room, list(bound), copies
        self._events: dict[int, CudaEvent] = {}
        self._first = bound[0].device
        devices = dict.fromkeys(b.device for b in bound)
        with Cleanup(self.close) as undo:
            for device in devices if len(devices) > 1 else ():
                self._events[device] = CudaEvent(room.cuda, device)
            undo.pop_all()

    @property
    def same_every_time(self) -> bool:
        """Whether all runs enqueue the very same work: copies of the state follow the text."""
        return self._copies is None and not self._events

    def may_be_captured(self, queue: CudaStream) -> bool:
        """What the library says of it, if it does; a refusal is logged once an engine, in its words."""
        loader = self._room.loader
        if not loader.flavour.capturable:
            return True
        for bound in self._bound:
            if isinstance(bound, ExpertsRun):
                continue
            loader.drain()
            if not bound.context.is_stream_capturable(queue.handles[bound.device]):
                file, words = bound.plan.part.file, loader.drain() or "it gives no reason"
                if file not in self._room.uncapturable:
                    logger.warning("%s cannot be captured and is launched piece by piece: %s", file, words)
                self._room.uncapturable.add(file)
                return False
        return True

    def enqueue(self, queue: CudaStream) -> None:
        """Puts every step on the stream of its device.

        Raises:
            DeviceError: the library or the driver refuses one.
        """
        at = self._first
        for bound in self._bound:
            device = bound.device
            if device != at:
                assert isinstance(bound, ProgramRun), "experts are where the program before them is"
                self._hand_over(queue, bound, at)
                at = device
            self._room.cuda.use(device)
            bound.enqueue(queue.handles[device])
            if self._copies is not None and isinstance(bound, ProgramRun):
                self._copies.enqueue(bound.plan.part.outputs, queue)

    def close(self) -> None:
        """Frees the contexts, then the events; idempotent. Kernels compiled for a context are kept first: they may go with it."""
        events = list(self._events.values())
        self._events.clear()
        steps = [bound.close for bound in self._bound]
        self._bound.clear()
        close_all((self._room.keep_kernels, *steps, *(event.close for event in events)))

    def _hand_over(self, queue: CudaStream, bound: ProgramRun, source: int) -> None:
        """Brings what a program reads from the device before it; the later device's stream waits for the earlier one's."""
        cuda, handover, device = self._room.cuda, self._room.handover, bound.device
        cuda.use(source)
        self._events[source].record(queue.handles[source])
        cuda.use(device)
        self._events[source].hold(queue.handles[device])
        for name, nbytes in bound.takes.items():
            target, origin = (handover[d].address(name, bound.index) for d in (device, source))
            cuda.copy(target, origin, nbytes, stream=queue.handles[device])
