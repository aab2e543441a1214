"""A graph on TensorRT: one engine, segments that run back to back, or programs with experts between, bound to fixed addresses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from twotower.bundle import ExpertsStep, Profile
from twotower.errors import RequestError
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.memory import DeviceBuffer, DeviceMemory
from twotower.runtime.cuda.passes import DevicePass, PassWork, Turns, downloads, uploads
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.experts import ExpertPlaces, ExpertRuntime
from twotower.runtime.engines.handover import HANDED, Handover, handed_bytes
from twotower.runtime.engines.tensorrt_binding import Bound, bind_execution
from twotower.runtime.engines.tensorrt_plan import Plan, PlanLoader
from twotower.runtime.engines.tensorrt_steps import ExpertsRun, ProgramRun, StepsRun
from twotower.runtime.weights import WeightStore
from twotower.spec import EXPERTS_IN, EXPERTS_OUT, SHARES, TowerSignature

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
        scratch: Activation memory of each device, address and bytes: one for all engines, as no two of them run at the same time.
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
        steps: Its engine, its segments, or programs and the experts after them, in the order they run.
        room: Shared with the bundle's other engines.
        data: The file its weights lie in, by which the room's store knows them.
        copies: Brings what this graph writes of the state to other devices that read it; None where there are none.
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
        sizes = _sizes(self.signature, arrays)
        profiles = [_profile(plan, sizes) for plan in self._plans]
        fixed = all(least == most for number, plan in zip(profiles, self._plans, strict=True) for least, most in _ends(plan, number))
        specialised = fixed and sizes.get("B") in self._room.rows
        run = self._bound_steps(arrays, _How(profiles, sizes, specialised))
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
        self._steps = self._plans = ()

    def _bound_steps(self, arrays: Mapping[str, DeviceBuffer], how: _How) -> StepsRun:
        """Every step at its addresses."""
        bound: list[ProgramRun | ExpertsRun] = []
        with Cleanup(lambda: close_all(step.close for step in bound)) as undo:
            index = -1
            for step in self._steps:
                index += isinstance(step, Plan)
                bound.append(self._program(step, index, arrays, how) if isinstance(step, Plan) else self._experts(step, index, how))
            undo.pop_all()
        return StepsRun(self._room, bound, None if self._copies is None else self._copies.of(arrays, how.sizes))

    def _program(self, plan: Plan, index: int, arrays: Mapping[str, DeviceBuffer], how: _How) -> ProgramRun:
        """An execution context of one program with its profile, shapes and addresses set."""
        room, device, part = self._room, plan.device, plan.part
        room.cuda.use(device)
        execution = room.loader.context(plan, specialised=how.specialised)
        places = {spec.name: self._address(spec.name, arrays, index) for spec in (*part.inputs, *part.outputs)}
        places |= {w.name: room.weights.address(self._data, w.name, device) for w in part.weights}
        to = Bound(
            profile=how.profiles[index],
            shapes={part.own(spec.name): spec.shape(how.sizes) for spec in part.inputs},
            addresses={part.own(name): address for name, address in places.items()},
            scratch=room.scratch[device],
        )
        bind_execution(execution, to, loader=room.loader, memory=room.memory)
        return ProgramRun(execution, index, handed_bytes(part, how.sizes), room.loader)

    def _experts(self, step: ExpertsStep, index: int, how: _How) -> ExpertsRun:
        """The experts after a program, where it leaves their inputs and the next one looks for what they write."""
        room, plan = self._room, self._plans[index]
        assert room.experts is not None, "opening makes sure of it"
        handover, device = room.handover[plan.device], plan.device
        x = next(spec for spec in plan.part.outputs if spec.name == EXPERTS_IN)
        places = ExpertPlaces(
            device=device,
            tokens=prod(x.shape(how.sizes)[:-1]),
            x=handover.address(EXPERTS_IN, index),
            shares=handover.address(SHARES, index),
            out=handover.address(EXPERTS_OUT, index),
            weights={role: room.weights.address(self._data, w.name, device) for role, w in step.weights.items()},
            scratch=room.scratch[device],
        )
        room.cuda.use(device)
        return ExpertsRun(room.experts.bind(step, places), device)

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
