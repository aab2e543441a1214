"""What the steps of a bundle share on a device: scratch memory, and where they hand over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from twotower.bundle import EngineFile, ExpertsStep, Step
from twotower.errors import EngineMismatchError
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.engines.experts import ExpertRuntime
from twotower.runtime.engines.handover import Handover, buffer_sizes

__all__ = ["SharedRoom", "furnish"]


class SharedRoom(Protocol):
    """What is furnished."""

    memory: DeviceMemory
    scratch: dict[int, tuple[int, int]]
    handover: dict[int, Handover]
    experts: ExpertRuntime | None


def furnish(
    room: SharedRoom,
    steps: Mapping[str, Sequence[Step]],
    *,
    scratch: Mapping[int, int],
    sizes: Mapping[str, int],
) -> None:
    """Allocates it on every device.

    Args:
        room: Where it goes.
        steps: Of every graph.
        scratch: For each device the bytes of scratch memory its programs need.
        sizes: The greatest of every dynamic axis.

    Raises:
        EngineMismatchError: a device has no room.
    """
    buffers: dict[str, tuple[int, int]] = {}
    for some in steps.values():
        programs = (step for step in some if isinstance(step, EngineFile))
        for name, (count, nbytes) in buffer_sizes(programs, sizes).items():
            buffers[name] = (count, max(nbytes, buffers.get(name, (0, 0))[1]))
    experts = [step for some in steps.values() for step in some if isinstance(step, ExpertsStep)]
    least = max((_experts_scratch(room, step, sizes) for step in experts), default=0)
    for device, needed in scratch.items():
        size = max(least, needed)
        try:
            room.scratch[device] = (room.memory.scratch(size, device), size)
            made = {}
            for name, (count, nbytes) in buffers.items():
                made[name] = tuple(room.memory.scratch(nbytes, device) for _ in range(count))
        except MemoryError as e:
            handed = sum(count * nbytes for count, nbytes in buffers.values())
            raise EngineMismatchError(
                f"GPU {device} has no room for the engines' activations",
                found=f"{(size + handed) / 1e9:.2f} GB needed besides the weights: {e}",
                do="build with a smaller --max-batch or --max-context, or spread the towers with --devices 0,1",
            ) from e
        room.handover[device] = Handover(made)


def _experts_scratch(room: SharedRoom, step: ExpertsStep, sizes: Mapping[str, int]) -> int:
    assert room.experts is not None, "opening makes sure of it"
    return room.experts.scratch_bytes(step, sizes["B"] * sizes["L"])
