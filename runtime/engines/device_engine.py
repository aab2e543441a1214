"""A graph on GPUs: one engine, segments that run back to back, or programs with experts between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from twotower.bundle import EngineFile, ExpertsStep
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.device_memory import DeviceBuffer
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.cuda.passes import DevicePass, PassWork, downloads, uploads
from twotower.runtime.engines.kernel_experts import ExpertStep
from twotower.runtime.engines.pass_steps import BoundProgram, PassSteps, StateCopies
from twotower.runtime.engines.shared_resources import SharedResources
from twotower.spec import TowerSignature


class Program(Protocol):
    """A program loaded on a device, with its build record."""

    @property
    def part(self) -> EngineFile: ...
    @property
    def device(self) -> int: ...


P = TypeVar("P", bound=Program)


@dataclass(frozen=True, slots=True)
class PassBuffers:
    """What a pass is bound to: buffers by name, and the axis sizes they imply, by letter."""

    arrays: Mapping[str, DeviceBuffer]
    sizes: Mapping[str, int]


class DeviceEngine(ABC, Generic[P]):
    """One graph of the contract.

    Args:
        steps: Programs and the experts after them, in the order they run.
        data: The file its weights lie in, by which the store knows them.
        copies: Brings what this graph writes of the state to other devices that read it; None where
            there are none.
    """

    def __init__(
        self,
        signature: TowerSignature,
        steps: Sequence[P | ExpertsStep],
        shared: SharedResources,
        *,
        data: Path,
        copies: StateCopies | None = None,
    ) -> None:
        self.signature = signature
        self._steps = tuple(steps)
        self._programs: tuple[P, ...] = tuple(s for s in steps if not isinstance(s, ExpertsStep))
        self._shared, self._data, self._copies = shared, data, copies

    def bind(self, arrays: Mapping[str, DeviceBuffer]) -> DevicePass:
        """Fixes addresses and shapes of every program; see `TowerEngine.bind`.

        Raises:
            RequestError: it was built for other shapes, or has no kernels for so many tokens.
            DeviceError: the library refuses an address or a shape.
        """
        if not self._steps:
            raise RuntimeError("the engine is closed")
        buffers = PassBuffers(arrays, _sizes_of(self.signature, arrays))
        sizes, shared = buffers.sizes, self._shared
        copies = None if self._copies is None else self._copies.of(arrays, sizes)
        bound = self._bound_steps(buffers)
        run = PassSteps(shared.cuda, shared.handover, bound, copies=copies)
        devices = tuple(program.device for program in self._programs)
        work = PassWork(
            name=f"the {self.signature.name} pass of {sizes.get('B', 1)} row(s)",
            devices=devices,
            before=uploads(self.signature, arrays),
            after=downloads(self.signature, arrays),
            enqueue=run.enqueue,
            capturable=self._capturable(run, buffers),
            # Kernels compiled for a context are kept first: they may go with it.
            close=lambda: close_all((self._keep_kernels, run.close)),
        )
        return DevicePass(
            shared.cuda,
            work,
            [shared.order[d] for d in dict.fromkeys(devices)],
        )

    def close(self) -> None:
        """Frees the programs; idempotent."""
        self._steps = self._programs = ()

    @abstractmethod
    def _bind_programs(self, buffers: PassBuffers) -> Iterator[BoundProgram]:
        """Binds the programs one by one, in order."""

    def _capturable(self, run: PassSteps, buffers: PassBuffers) -> Callable[[CudaStream], bool]:
        """What says whether the pass may be captured as a CUDA graph."""
        return lambda queue: False

    def _keep_kernels(self) -> None:
        """Saves what was compiled while a pass was bound and run."""

    def _bound_steps(self, buffers: PassBuffers) -> list[BoundProgram | ExpertStep]:
        programs: list[BoundProgram] = []
        bound: list[BoundProgram | ExpertStep] = []
        with Cleanup(lambda: close_all(program.close for program in programs)) as undo:
            unbound = self._bind_programs(buffers)
            for step in self._steps:
                if isinstance(step, ExpertsStep):
                    experts = self._shared.bind_experts(
                        step, programs[-1], buffers.sizes, self._data
                    )
                    bound.append(experts)
                else:
                    programs.append(next(unbound))
                    bound.append(programs[-1])
            undo.pop_all()
        return bound

    def _addresses(self, program: P, index: int, buffers: PassBuffers) -> dict[str, int]:
        """Where a program finds inputs and outputs: in buffers, or where steps hand over."""
        addresses: dict[str, int] = {}
        for spec in (*program.part.inputs, *program.part.outputs):
            if spec.name in buffers.arrays:
                address = buffers.arrays[spec.name].addresses[program.device]
            else:
                address = self._shared.handover[program.device].address(spec.name, index)
            addresses[spec.name] = address
        return addresses


def _sizes_of(signature: TowerSignature, arrays: Mapping[str, DeviceBuffer]) -> dict[str, int]:
    """Axis sizes by letter, from the shapes of the buffers a graph is bound to."""
    out: dict[str, int] = {}
    for spec in (*signature.inputs, *signature.outputs):
        known = zip(spec.axes, arrays[spec.name].shape, strict=True)
        out |= {axis: size for axis, size in known if isinstance(axis, str)}
    return out
