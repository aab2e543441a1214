"""A graph on TensorRT: one engine, or segments that run back to back, bound to fixed addresses and enqueued on a tower's stream."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from twotower.bundle import Profile
from twotower.errors import DeviceError, RequestError
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.memory import DeviceBuffer, DeviceMemory
from twotower.runtime.cuda.passes import DevicePass, PassWork, Turns, downloads, uploads
from twotower.runtime.cuda.streams import CudaEvent, CudaStream
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.tensorrt_binding import Bound, bind_execution
from twotower.runtime.engines.tensorrt_plan import Execution, Plan, PlanLoader
from twotower.runtime.memory import numpy_dtype
from twotower.runtime.weights import WeightStore
from twotower.spec import CONDITIONING, RESIDUAL_IN, RESIDUAL_OUT, TensorSpec, TowerSignature

__all__ = ["EngineRoom", "TensorRTEngine", "handover_bytes"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineRoom:
    """What the engines of one bundle share.

    Attributes:
        cuda: The calls.
        loader: The library.
        memory: Buffers.
        weights: Weights that engines read as inputs, one copy a device for all that read them.
        graphs: Whether passes may be captured.
        scratch: Activation memory of each device, address and bytes: one for all engines, as no two of them run at the same time.
        handover: On each device, where segments hand the residual stream over: two halves that take turns; and the conditioning.
        turns: Keeps executions on a device apart.
        rows: Numbers of rows kernels are specialised for.
        uncapturable: Engines the library has refused to capture; each is said once.
    """

    cuda: Cuda
    loader: PlanLoader
    memory: DeviceMemory
    weights: WeightStore
    graphs: bool
    scratch: dict[int, tuple[int, int]] = field(default_factory=dict)
    handover: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    turns: dict[int, Turns] = field(default_factory=lambda: defaultdict(Turns))
    rows: tuple[int, ...] = ()
    uncapturable: set[str] = field(default_factory=set)

    def keep_kernels(self) -> None:
        """Saves what was compiled since it was last saved."""
        for plan in self.loader.unsaved:
            self.cuda.use(plan.device)
            self.loader.keep_kernels(plan)


class TensorRTEngine:
    """One graph of the contract on TensorRT.

    Args:
        signature: Its inputs and outputs.
        plans: Its segments in the order they run.
        room: Shared with the bundle's other engines.
        data: The file its weights lie in, by which the room's store knows them.
        copies: Brings what this graph writes of the state to other devices that read it; None where there are none.
    """

    def __init__(
        self,
        signature: TowerSignature,
        plans: Sequence[Plan],
        room: EngineRoom,
        *,
        data: Path,
        copies: StateCopies | None = None,
    ) -> None:
        self.signature = signature
        self._plans: tuple[Plan, ...] = tuple(plans)
        self._room = room
        self._data = data
        self._copies = copies

    def bind(self, arrays: Mapping[str, DeviceBuffer]) -> DevicePass:
        """Fixes addresses and shapes in an execution context for each segment; see `TowerEngine.bind`.

        Raises:
            RequestError: the engine was built for other shapes.
            DeviceError: the library refuses an address or a shape.
        """
        if not self._plans:
            raise RuntimeError("the engine is closed")
        sizes = _sizes(self.signature, arrays)
        profiles = [_profile(plan, sizes) for plan in self._plans]
        fixed = all(least == most for number, plan in zip(profiles, self._plans, strict=True) for least, most in _ends(plan, number))
        specialised = fixed and sizes.get("B") in self._room.rows
        bound = [
            self._bound(plan, index, arrays, (number, sizes, specialised))
            for index, (plan, number) in enumerate(zip(self._plans, profiles, strict=True))
        ]
        run = _Segments(self._room, bound, None if self._copies is None else self._copies.of(arrays, sizes))
        devices = tuple(plan.device for plan in self._plans)
        capturable = fixed and self._room.graphs and run.same_every_time
        work = PassWork(
            name=f"the {self.signature.name} pass of {sizes.get('B', 1)} row(s)",
            devices=devices,
            before=uploads(self.signature, arrays),
            after=downloads(self.signature, arrays),
            enqueue=run.enqueue,
            capturable=lambda queue: capturable and run.may_be_captured(queue),
            close=run.close,
        )
        return DevicePass(self._room.cuda, work, [self._room.turns[device] for device in dict.fromkeys(devices)])

    def close(self) -> None:
        """Frees the engines; idempotent."""
        self._plans = ()

    def _bound(
        self,
        plan: Plan,
        index: int,
        arrays: Mapping[str, DeviceBuffer],
        how: tuple[int, dict[str, int], bool],
    ) -> _Segment:
        """An execution context of one segment with its profile, shapes and addresses set."""
        number, sizes, specialised = how
        room, device = self._room, plan.device
        room.cuda.use(device)
        execution = room.loader.context(plan, specialised=specialised)
        inputs = {spec.name: spec for spec in plan.part.inputs}
        names = [spec.name for spec in (*plan.part.inputs, *plan.part.outputs)]
        weights = {w.name: room.weights.address(self._data, w.name, device) for w in plan.part.weights}
        to = Bound(
            profile=number,
            shapes={name: spec.shape(sizes) for name, spec in inputs.items()},
            addresses={name: self._address(name, arrays, index) for name in names} | weights,
            scratch=room.scratch[device],
        )
        bind_execution(execution, to, loader=room.loader, memory=room.memory)
        residual, conditioning = inputs.get(RESIDUAL_IN), inputs.get(CONDITIONING)
        return _Segment(execution, index, _nbytes(residual, sizes), _nbytes(conditioning, sizes))

    def _address(self, name: str, arrays: Mapping[str, DeviceBuffer], index: int) -> int:
        """Where a segment finds a tensor: in a buffer, or where its neighbours hand over."""
        device = self._plans[index].device
        if name in arrays:
            return arrays[name].addresses[device]
        if name == CONDITIONING:
            return self._room.handover[device][2]
        assert name in (RESIDUAL_IN, RESIDUAL_OUT), name
        return self._room.handover[device][(index + (name == RESIDUAL_OUT)) % 2]


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment ready to run: its context, its number, and the bytes it takes over from the segments before it."""

    execution: Execution
    index: int
    residual: int
    conditioning: int

    @property
    def plan(self) -> Plan:
        return self.execution.plan

    @property
    def context(self) -> Any:
        return self.execution.context


class _Segments:
    """Enqueues the segments of one pass."""

    def __init__(self, room: EngineRoom, bound: Sequence[_Segment], copies: Any) -> None:
        self._room, self._bound, self._copies = room, list(bound), copies
        self._events: dict[int, CudaEvent] = {}
        self._first = bound[0].plan.device
        devices = dict.fromkeys(b.plan.device for b in bound)
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
            loader.drain()
            if not bound.context.is_stream_capturable(queue.handles[bound.plan.device]):
                file, words = bound.plan.part.file, loader.drain() or "it gives no reason"
                if file not in self._room.uncapturable:
                    logger.warning("%s cannot be captured and is launched piece by piece: %s", file, words)
                self._room.uncapturable.add(file)
                return False
        return True

    def enqueue(self, queue: CudaStream) -> None:
        """Puts every segment on the stream of its device.

        Raises:
            DeviceError: the library refuses one.
        """
        at = self._first
        for bound in self._bound:
            device = bound.plan.device
            if device != at:
                self._hand_over(queue, bound, at)
                at = device
            self._room.cuda.use(device)
            if not bound.context.execute_async_v3(queue.handles[device]):
                raise DeviceError(
                    f"{bound.plan.part.file} was not run",
                    found=f"the library refused to enqueue it{_because(self._room.loader)}",
                    do="run `twotower doctor BUNDLE`; an engine that was built for another GPU fails like this",
                )
            if self._copies is not None:
                self._copies.enqueue(bound.plan.part.outputs, queue)

    def close(self) -> None:
        """Frees the contexts, then the events; idempotent. Kernels compiled for a context are kept first: they may go with it."""
        events = list(self._events.values())
        self._events.clear()
        contexts = [bound.execution.close for bound in self._bound]
        self._bound.clear()
        close_all((self._room.keep_kernels, *contexts, *(event.close for event in events)))

    def _hand_over(self, queue: CudaStream, bound: _Segment, source: int) -> None:
        """Brings what a segment reads from the device before it; the later device's stream waits for the earlier one's."""
        cuda, handover, device = self._room.cuda, self._room.handover, bound.plan.device
        cuda.use(source)
        self._events[source].record(queue.handles[source])
        cuda.use(device)
        self._events[source].hold(queue.handles[device])
        half = bound.index % 2
        cuda.copy(handover[device][half], handover[source][half], bound.residual, stream=queue.handles[device])
        if bound.conditioning:
            cuda.copy(handover[device][2], handover[source][2], bound.conditioning, stream=queue.handles[device])


def handover_bytes(plans: Sequence[Plan], sizes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of the residual stream and of the conditioning where segments hand over, at most; zeros for a graph in one piece."""
    specs = {spec.name: spec for plan in plans for spec in plan.part.inputs}
    return _nbytes(specs.get(RESIDUAL_IN), sizes), _nbytes(specs.get(CONDITIONING), sizes)


def _nbytes(spec: TensorSpec | None, sizes: Mapping[str, int]) -> int:
    return 0 if spec is None else prod(spec.shape(sizes)) * numpy_dtype(spec.dtype).itemsize


def _sizes(signature: TowerSignature, arrays: Mapping[str, DeviceBuffer]) -> dict[str, int]:
    """The letters' sizes, from the shapes of the buffers."""
    out: dict[str, int] = {}
    for spec in (*signature.inputs, *signature.outputs):
        out.update({axis: size for axis, size in zip(spec.axes, arrays[spec.name].shape, strict=True) if isinstance(axis, str)})
    return out


def _profile(plan: Plan, sizes: Mapping[str, int]) -> int:
    """The narrowest profile that admits the shapes: later ones are narrower."""
    for number, profile in reversed(list(enumerate(plan.part.profiles))):
        if profile.admits(sizes):
            return number
    raise RequestError(
        f"{plan.part.file} was not built for these shapes",
        found=f"{dict(sizes)}; built for {'; '.join(_described(p) for p in plan.part.profiles)}",
        do="build it with a larger --max-batch",
    )


def _ends(plan: Plan, number: int) -> list[tuple[int, int]]:
    """Least and most of the axes of a profile that are not the number of rows: contexts are made for one number of rows anyway."""
    return [(least, most) for axis, (least, _, most) in plan.part.profiles[number].axes.items() if axis != "B"]


def _described(profile: Profile) -> str:
    return f"{profile.name}: " + ", ".join(f"{axis} {least} to {most}" for axis, (least, _, most) in profile.axes.items())


def _because(loader: PlanLoader) -> str:
    said = loader.drain()
    return f": {said}" if said else ""
