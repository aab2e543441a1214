"""A graph on TensorRT: one engine, segments that run back to back, or programs with experts between, bound to fixed addresses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twotower.bundle import ExpertsStep, Profile
from twotower.errors import RequestError
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer, DeviceMemory
from twotower.runtime.cuda.passes import DevicePass, PassWork, Turns, downloads, uploads
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.experts import ExpertRuntime
from twotower.runtime.engines.handover import HANDED, Handover, handed_bytes
from twotower.runtime.engines.step_runs import (
    ExpertsAt,
    ExpertsRun,
    StepsRun,
    bind_experts,
    sizes_of,
)
from twotower.runtime.engines.tensorrt_plan import Plan, PlanLoader
from twotower.runtime.engines.tensorrt_steps import (
    Bound,
    ProgramRun,
    bind_execution,
    may_be_captured,
)
from twotower.runtime.weights.store import WeightStore
from twotower.spec import TowerSignature

__all__ = ["EngineRoom", "TensorRTEngine"]


@dataclass(slots=True)
class EngineRoom:
    """What the engines of one bundle share.

    Attributes:
        cuda: The calls.
        loader: The library.
        memory: Buffers.
        weights: Weights that engines read as inputs, one copy a device for all that read them.
        graphs: Whether passes may be captured.
        scratch: Activation memory of each device, address and bytes: one for all engines, as no two
            of them run at the same time.
        handover: On each device, where steps hand over.
        turns: Keeps executions on a device apart.
        rows: Numbers of rows kernels are specialised for.
        uncapturable: Engines the library has refused to capture; each is said once.
        experts: What computes experts between programs; None where engines compute them.
    """

    cuda: Cuda
    loader: PlanLoader
    memory: DeviceMemory
    weights: WeightStore
    graphs: bool
    scratch: dict[int, tuple[int, int]] = field(default_factory=dict)
    handover: dict[int, Handover] = field(default_factory=dict)
    turns: dict[int, Turns] = field(default_factory=lambda: defaultdict(Turns))
    rows: tuple[int, ...] = ()
    uncapturable: set[str] = field(default_factory=set)
    experts: ExpertRuntime | None = None

    def keep_kernels(self) -> None:
        """Saves what was compiled since it was last saved."""
        for plan in self.loader.unsaved:
            self.cuda.use(plan.device)
            self.loader.keep_kernels(plan)


class TensorRTEngine:
    """One graph of the contract on TensorRT.

    Args:
        signature: Its inputs and outputs.
        steps: Its engine, its segments, or programs and the experts after them, in the order they
            run.
        room: Shared with the bundle's other engines.
        data: The file its weights lie in, by which the room's store knows them.
        copies: Brings what this graph writes of the state to other devices that read it; None where
            there are none.
    """

    def __init__(
        self,
        signature: TowerSignature,
        steps: Sequence[Plan | ExpertsStep],
        room: EngineRoom,
        *,
        data: Path,
        copies: StateCopies | None = None,
    ) -> None:
        self.signature = signature
        self._steps: tuple[Plan | ExpertsStep, ...] = tuple(steps)
        self._plans = tuple(step for step in steps if isinstance(step, Plan))
        self._room = room
        self._data = data
        self._copies = copies

    def bind(self, arrays: Mapping[str, DeviceBuffer]) -> DevicePass:
        """Fixes addresses and shapes in an execution context for each program; see `TowerEngine.bind`.

        Raises:
            RequestError: the engine was built for other shapes.
            DeviceError: the library refuses an address or a shape.
        """
        if not self._plans:
            raise RuntimeError("the engine is closed")
        sizes = sizes_of(self.signature, arrays)
        profiles = [_profile(plan, sizes) for plan in self._plans]
        fixed = all(
            least == most
            for number, plan in zip(profiles, self._plans, strict=True)
            for least, most in _ends(plan, number)
        )
        specialised = fixed and sizes.get("B") in self._room.rows
        bound = self._bound_steps(arrays, _How(profiles, sizes, specialised))
        copies = None if self._copies is None else self._copies.of(arrays, sizes)
        run = StepsRun(self._room.cuda, self._room.handover, bound, copies=copies)
        programs = [step for step in bound if isinstance(step, ProgramRun)]
        devices = tuple(plan.device for plan in self._plans)
        capturable = fixed and self._room.graphs and run.same_every_time
        room = self._room
        work = PassWork(
            name=f"the {self.signature.name} pass of {sizes.get('B', 1)} row(s)",
            devices=devices,
            before=uploads(self.signature, arrays),
            after=downloads(self.signature, arrays),
            enqueue=run.enqueue,
            capturable=lambda queue: (
                capturable
                and may_be_captured(programs, queue, room.loader, refused=room.uncapturable)
            ),
            # Kernels compiled for a context are kept first: they may go with it.
            close=lambda: close_all((room.keep_kernels, run.close)),
        )
        return DevicePass(
            self._room.cuda, work, [self._room.turns[device] for device in dict.fromkeys(devices)]
        )

    def close(self) -> None:
        """Frees the engines; idempotent."""
        self._steps = self._plans = ()

    def _bound_steps(
        self, arrays: Mapping[str, DeviceBuffer], how: _How
    ) -> list[ProgramRun | ExpertsRun]:
        """Every step at its addresses."""
        bound: list[ProgramRun | ExpertsRun] = []
        with Cleanup(lambda: close_all(step.close for step in bound)) as undo:
            index = -1
            for step in self._steps:
                if isinstance(step, Plan):
                    index += 1
                    bound.append(self._program(step, index, arrays, how))
                else:
                    after = self._plans[index]
                    at = ExpertsAt(after.device, index, how.sizes, self._data)
                    bound.append(bind_experts(self._room, step, after.part, at))
            undo.pop_all()
        return bound

    def _program(
        self, plan: Plan, index: int, arrays: Mapping[str, DeviceBuffer], how: _How
    ) -> ProgramRun:
        """An execution context of one program with its profile, shapes and addresses set."""
        room, device, part = self._room, plan.device, plan.part
        room.cuda.use(device)
        execution = room.loader.context(plan, specialised=how.specialised)
        places = {
            spec.name: self._address(spec.name, arrays, index)
            for spec in (*part.inputs, *part.outputs)
        }
        places |= {w.name: room.weights.address(self._data, w.name, device) for w in part.weights}
        to = Bound(
            profile=how.profiles[index],
            shapes={part.own(spec.name): spec.shape(how.sizes) for spec in part.inputs},
            addresses={part.own(name): address for name, address in places.items()},
            scratch=room.scratch[device],
        )
        bind_execution(execution, to, loader=room.loader, memory=room.memory)
        return ProgramRun(execution, index, handed_bytes(part, how.sizes), room.loader)

    def _address(self, name: str, arrays: Mapping[str, DeviceBuffer], index: int) -> int:
        """Where a program finds a tensor: in a buffer, or where its neighbours hand over."""
        device = self._plans[index].device
        if name in arrays:
            return arrays[name].addresses[device]
        assert name in HANDED, name
        return self._room.handover[device].address(name, index)


@dataclass(frozen=True, slots=True)
class _How:
    """What a pass is bound for: the profile of each program, the letters' sizes, and whether kernels are specialised for them."""

    profiles: Sequence[int]
    sizes: Mapping[str, int]
    specialised: bool


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
    return [
        (least, most)
        for axis, (least, _, most) in plan.part.profiles[number].axes.items()
        if axis != "B"
    ]


def _described(profile: Profile) -> str:
    return f"{profile.name}: " + ", ".join(
        f"{axis} {least} to {most}" for axis, (least, _, most) in profile.axes.items()
    )
