"""A graph in sessions of ONNX Runtime that work on a stream of ours, bound once.

That is one session, or programs with experts between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bundle import EngineFile, ExpertsStep
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer, DeviceMemory
from twotower.runtime.cuda.passes import DevicePass, PassWork, Turns, downloads, uploads
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.experts import ExpertRuntime
from twotower.runtime.engines.handover import Handover, handed_bytes, with_tokens
from twotower.runtime.engines.ort_library import OrtLibrary, element_type
from twotower.runtime.engines.step_runs import (
    ExpertsAt,
    ExpertsRun,
    StepsRun,
    bind_experts,
    sizes_of,
)
from twotower.runtime.weights.store import WeightStore
from twotower.spec import TensorSpec, TowerSignature

__all__ = ["OrtDeviceEngine", "OrtProgram", "OrtRoom"]


@dataclass(slots=True)
class OrtRoom:
    """What the engines of one bundle share.

    Attributes:
        cuda: The calls.
        library: ONNX Runtime.
        memory: Buffers.
        weights: Those that experts between programs read; sessions have theirs themselves.
        scratch: Memory for experts between programs on each device, address and bytes.
        handover: On each device, where steps hand over.
        turns: Keeps passes on a device apart.
        experts: What computes experts between programs; None where sessions compute them.
    """

    cuda: Cuda
    library: OrtLibrary
    memory: DeviceMemory
    weights: WeightStore
    scratch: dict[int, tuple[int, int]] = field(default_factory=dict)
    handover: dict[int, Handover] = field(default_factory=dict)
    turns: dict[int, Turns] = field(default_factory=lambda: defaultdict(Turns))
    experts: ExpertRuntime | None = None


@dataclass(frozen=True, slots=True)
class OrtProgram:
    """A session on a device, made for the stream of its passes; the build describes its graph."""

    part: EngineFile
    device: int
    session: Any


class OrtDeviceEngine:
    """One graph of the contract.

    Args:
        signature: Its inputs and outputs.
        steps: Its session, or programs and the experts after them, in the order they run.
        room: Shared with the bundle's other engines.
        data: The file its weights lie in, by which the room's store knows them.
        copies: Brings what this graph writes of the state to other devices that read it; None where
            there are none.
    """

    def __init__(
        self,
        signature: TowerSignature,
        steps: Sequence[OrtProgram | ExpertsStep],
        room: OrtRoom,
        *,
        data: Path,
        copies: StateCopies | None = None,
    ) -> None:
        self.signature = signature
        self._steps: tuple[OrtProgram | ExpertsStep, ...] = tuple(steps)
        self._room, self._data, self._copies = room, data, copies

    def bind(self, arrays: Mapping[str, DeviceBuffer]) -> DevicePass:
        """Binds every input and output to its address; see `TowerEngine.bind`.

        Raises:
            RequestError: there are no kernels for so many tokens.
        """
        if not self._steps:
            raise RuntimeError("the engine is closed")
        room, sizes = self._room, sizes_of(self.signature, arrays)
        copies = None if self._copies is None else self._copies.of(arrays, sizes)
        run = StepsRun(room.cuda, room.handover, self._bound_steps(arrays, sizes), copies=copies)
        devices = tuple(step.device for step in self._steps if isinstance(step, OrtProgram))
        work = PassWork(
            name=f"the {self.signature.name} pass",
            devices=devices,
            before=uploads(self.signature, arrays),
            after=downloads(self.signature, arrays),
            enqueue=run.enqueue,
            capturable=lambda queue: False,
            close=run.close,
        )
        turns = [room.turns[device] for device in dict.fromkeys(devices)]
        return DevicePass(room.cuda, work, turns)

    def close(self) -> None:
        """Frees the sessions; idempotent."""
        self._steps = ()

    def _bound_steps(
        self,
        arrays: Mapping[str, DeviceBuffer],
        sizes: Mapping[str, int],
    ) -> list[_Running | ExpertsRun]:
        """Every step at its addresses."""
        bound: list[_Running | ExpertsRun] = []
        programs: list[OrtProgram] = []
        with Cleanup(lambda: close_all(step.close for step in bound)) as undo:
            for step in self._steps:
                if isinstance(step, OrtProgram):
                    bound.append(self._program(step, len(programs), arrays, sizes))
                    programs.append(step)
                else:
                    at = ExpertsAt(programs[-1].device, len(programs) - 1, sizes, self._data)
                    bound.append(bind_experts(self._room, step, programs[-1].part, at))
            undo.pop_all()
        return bound

    def _program(
        self,
        program: OrtProgram,
        index: int,
        arrays: Mapping[str, DeviceBuffer],
        sizes: Mapping[str, int],
    ) -> _Running:
        """A binding of one session: tensors are in buffers, or where its neighbours hand over."""
        room, part, device = self._room, program.part, program.device
        binding = program.session.io_binding()
        kind, number = room.library.device_type, device if room.library.device_type == "cuda" else 0
        known = with_tokens(part, sizes)
        for specs, bind in ((part.inputs, binding.bind_input), (part.outputs, binding.bind_output)):
            for spec in specs:
                buffer = arrays.get(spec.name)
                if buffer is None:
                    shape = spec.shape(known)
                    at = room.handover[device].address(spec.name, index)
                else:
                    shape, at = buffer.shape, buffer.addresses[device]
                bind(spec.name, kind, number, element_type(spec.dtype), shape, at)
        takes = handed_bytes(part, sizes)
        return _Running(program, binding, room.library.run_options(), index, takes)


@dataclass(frozen=True, slots=True)
class _Running:
    """A session with its addresses; see `RunningProgram`."""

    program: OrtProgram
    binding: Any
    options: Any
    index: int
    takes: Mapping[str, int]

    @property
    def device(self) -> int:
        return self.program.device

    @property
    def writes(self) -> Sequence[TensorSpec]:
        return self.program.part.outputs

    def enqueue(self, stream: int) -> None:
        """Puts it on the stream its session was made for, which is this one."""
        self.program.session.run_with_iobinding(self.binding, self.options)

    def close(self) -> None:
        """Nothing was made that is not let go with the object."""
