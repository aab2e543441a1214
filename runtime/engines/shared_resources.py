"""What the engines of a bundle share on their devices: memory, weights and kernels of experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twotower.bundle import EngineFile, ExpertsStep, Step
from twotower.errors import EngineMismatchError
from twotower.kernels import scratch_bytes
from twotower.kernels.shape import shape_of
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.cuda.passes import ScratchOrder
from twotower.runtime.engines.handover import Handover, buffer_sizes, with_tokens
from twotower.runtime.engines.kernel_experts import ExpertStep, KernelExperts
from twotower.runtime.engines.pass_steps import BoundProgram
from twotower.runtime.weights.store import WeightStore
from twotower.spec import EXPERTS_IN, EXPERTS_OUT, SHARES
from twotower.units import format_bytes


@dataclass(slots=True)
class SharedResources:
    """What the engines of one bundle share.

    Attributes:
        experts: Kernels of the experts between programs; None where there are no such steps.
        scratch: Activation memory of each device, address and bytes: one for all engines, as no two
            of them run at the same time.
        handover: On each device, where steps hand over.
        order: Keeps passes that use the scratch memory of a device apart.
    """

    cuda: Cuda
    memory: DeviceMemory
    weights: WeightStore
    experts: KernelExperts | None = None
    scratch: dict[int, tuple[int, int]] = field(default_factory=dict)
    handover: dict[int, Handover] = field(default_factory=dict)
    order: dict[int, ScratchOrder] = field(default_factory=lambda: defaultdict(ScratchOrder))

    def allocate(
        self,
        steps: Iterable[Sequence[Step]],
        *,
        scratch: Mapping[int, int],
        sizes: Mapping[str, int],
    ) -> None:
        """Allocates scratch memory and hand-over buffers on every device.

        `scratch` is in bytes by device, `sizes` the greatest of every dynamic axis. Raises
        EngineMismatchError if a device has no room.
        """
        least, buffers = 0, dict[str, tuple[int, int]]()
        for some in steps:
            programs = [step for step in some if isinstance(step, EngineFile)]
            for name, (count, nbytes) in buffer_sizes(programs, sizes).items():
                buffers[name] = (count, max(nbytes, buffers.get(name, (0, 0))[1]))
            for step in some:
                if isinstance(step, ExpertsStep):
                    tokens = sizes["B"] * sizes["L"]
                    least = max(least, scratch_bytes(shape_of(step), tokens))
        for device, needed in scratch.items():
            size = max(least, needed)
            made: dict[str, tuple[int, ...]] = {}
            try:
                self.scratch[device] = (self.memory.scratch(size, device), size)
                for name, (count, nbytes) in buffers.items():
                    made[name] = tuple(self.memory.scratch(nbytes, device) for _ in range(count))
            except MemoryError as e:
                total = size + sum(count * nbytes for count, nbytes in buffers.values())
                raise EngineMismatchError(
                    f"GPU {device} has no room for the engines' activations",
                    found=f"{format_bytes(total)} needed besides the weights: {e}",
                    do="build with a smaller --max-batch or --max-context, or spread the towers "
                    "with --devices 0,1",
                ) from e
            self.handover[device] = Handover(made)

    def bind_experts(
        self, step: ExpertsStep, after: BoundProgram, sizes: Mapping[str, int], data: Path
    ) -> ExpertStep:
        """The experts after a program; the next program reads their outputs.

        `data` is the file of their weights. Raises RequestError without kernels for so many tokens.
        """
        assert self.experts is not None, "opening loads them"
        device, handover = after.device, self.handover[after.device]
        addresses = {
            "x": handover.address(EXPERTS_IN, after.index),
            "shares": handover.address(SHARES, after.index),
            "out": handover.address(EXPERTS_OUT, after.index),
        }
        for role, weight in step.weights.items():
            addresses[role] = self.weights.address(data, weight.name, device)
        self.cuda.use(device)
        code, tokens = self.experts.code(step, device), with_tokens(after.part, sizes)["N"]
        return ExpertStep(
            code,
            tokens,
            addresses,
            self.scratch[device][0],
        )


def code_places(steps: Sequence[Step], devices: Sequence[int]) -> list[tuple[str, int]]:
    """The expert code each device runs: experts are where the program before them is."""
    out, places, device = [], iter(devices), -1
    for step in steps:
        if isinstance(step, ExpertsStep):
            out.append((step.code, device))
        else:
            device = next(places)
    return out
