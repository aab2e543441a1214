"""The steps of one pass, programs and the experts between them, as they are enqueued.

What a program is, its library knows; the order, the hand-over and the experts are the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from twotower.bundle import EngineFile, ExpertsStep, Step
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer
from twotower.runtime.cuda.device_streams import CudaEvent, CudaStream
from twotower.runtime.engines.experts import BoundExperts, ExpertPlaces, ExpertRuntime
from twotower.runtime.engines.handover import Handover
from twotower.runtime.weights.store import WeightStore
from twotower.spec import EXPERTS_IN, EXPERTS_OUT, SHARES, TensorSpec, TowerSignature

__all__ = [
    "ExpertsAt",
    "ExpertsRoom",
    "ExpertsRun",
    "RunningProgram",
    "StepsRun",
    "bind_experts",
    "code_places",
    "sizes_of",
]


class RunningProgram(Protocol):
    """A program bound to its addresses.

    Attributes:
        device: Where it runs.
        index: Its number in its tower.
        takes: What it takes over from the programs and experts before it, in bytes by name.
        writes: Its outputs.
    """

    @property
    def device(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def takes(self) -> Mapping[str, int]: ...
    @property
    def writes(self) -> Sequence[TensorSpec]: ...

    def enqueue(self, stream: int) -> None:
        """Puts it on a stream of its device, which is current.

        Raises:
            DeviceError: the library refuses.
        """
        ...

    def close(self) -> None:
        """Frees what was made for it; idempotent."""
        ...


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


class ExpertsRoom(Protocol):
    """What experts need of what engines share.

    Attributes:
        cuda: The calls.
        weights: By which they find theirs.
        scratch: On each device memory for them, address and bytes.
        handover: On each device, where steps hand over.
        experts: What computes them.
    """

    cuda: Cuda
    weights: WeightStore
    scratch: dict[int, tuple[int, int]]
    handover: dict[int, Handover]
    experts: ExpertRuntime | None


@dataclass(frozen=True, slots=True)
class ExpertsAt:
    """Where the experts after a program are.

    Attributes:
        device: Of the program, and so theirs.
        index: The program's number in its tower.
        sizes: The letters' sizes.
        data: The file their weights lie in, by which the store knows them.
    """

    device: int
    index: int
    sizes: Mapping[str, int]
    data: Path


def bind_experts(
    room: ExpertsRoom,
    step: ExpertsStep,
    after: EngineFile,
    at: ExpertsAt,
) -> ExpertsRun:
    """The experts after a program: it leaves their inputs, and the next reads what they write.

    Raises:
        RequestError: there are no kernels for so many tokens.
    """
    assert room.experts is not None, "opening makes sure of it"
    handover, index = room.handover[at.device], at.index
    x = next(spec for spec in after.outputs if spec.name == EXPERTS_IN)
    named = {role: weight.name for role, weight in step.weights.items()}
    places = ExpertPlaces(
        device=at.device,
        tokens=prod(x.shape(at.sizes)[:-1]),
        x=handover.address(EXPERTS_IN, index),
        shares=handover.address(SHARES, index),
        out=handover.address(EXPERTS_OUT, index),
        weights={r: room.weights.address(at.data, name, at.device) for r, name in named.items()},
        scratch=room.scratch[at.device],
    )
    room.cuda.use(at.device)
    return ExpertsRun(room.experts.bind(step, places), at.device)


def code_places(steps: Sequence[Step], devices: Sequence[int]) -> list[tuple[str, int]]:
    """The code of experts that each device runs: experts are where the program before them is.

    Args:
        steps: Of a graph.
        devices: Of its programs.
    """
    out, places, device = [], iter(devices), -1
    for step in steps:
        if isinstance(step, ExpertsStep):
            out.append((step.code, device))
        else:
            device = next(places)
    return out


def sizes_of(signature: TowerSignature, arrays: Mapping[str, DeviceBuffer]) -> dict[str, int]:
    """The letters' sizes, from the shapes of the buffers a graph is bound to."""
    out: dict[str, int] = {}
    for spec in (*signature.inputs, *signature.outputs):
        known = zip(spec.axes, arrays[spec.name].shape, strict=True)
        out.update({axis: size for axis, size in known if isinstance(axis, str)})
    return out


class StepsRun:
    """Enqueues the steps of one pass.

    Args:
        cuda: The calls.
        handover: On each device, where steps hand over.
        bound: The steps in order; the first is a program.
        copies: Brings what they write of the state to other devices; None where there are none.
    """

    def __init__(
        self,
        cuda: Cuda,
        handover: Mapping[int, Handover],
        bound: Sequence[RunningProgram | ExpertsRun],
        *,
        copies: Any = None,
    ) -> None:
        self._cuda, self._handover = cuda, handover
        self._bound, self._copies = list(bound), copies
        self._events: dict[int, CudaEvent] = {}
        self._first = bound[0].device
        devices = dict.fromkeys(b.device for b in bound)
        with Cleanup(self.close) as undo:
            for device in devices if len(devices) > 1 else ():
                self._events[device] = CudaEvent(cuda, device)
            undo.pop_all()

    @property
    def same_every_time(self) -> bool:
        """Whether all runs enqueue the very same work: copies of the state follow the text."""
        return self._copies is None and not self._events

    def enqueue(self, queue: CudaStream) -> None:
        """Puts every step on the stream of its device.

        Raises:
            DeviceError: the library or the driver refuses one.
        """
        at = self._first
        for bound in self._bound:
            device = bound.device
            if device != at:
                assert not isinstance(bound, ExpertsRun), "they are where the program before is"
                self._hand_over(queue, bound, at)
                at = device
            self._cuda.use(device)
            bound.enqueue(queue.handles[device])
            if self._copies is not None and not isinstance(bound, ExpertsRun):
                self._copies.enqueue(bound.writes, queue)

    def close(self) -> None:
        """Frees the steps, then the events; idempotent."""
        events = list(self._events.values())
        self._events.clear()
        steps = [bound.close for bound in self._bound]
        self._bound.clear()
        close_all((*steps, *(event.close for event in events)))

    def _hand_over(self, queue: CudaStream, bound: RunningProgram, source: int) -> None:
        """Brings what a program reads from the device before it, whose stream is waited for."""
        cuda, device = self._cuda, bound.device
        cuda.use(source)
        self._events[source].record(queue.handles[source])
        cuda.use(device)
        self._events[source].hold(queue.handles[device])
        for name, nbytes in bound.takes.items():
            target = self._handover[device].address(name, bound.index)
            origin = self._handover[source].address(name, bound.index)
            cuda.copy(target, origin, nbytes, stream=queue.handles[device])
