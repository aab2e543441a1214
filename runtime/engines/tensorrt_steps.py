"""A program of TensorRT ready to run: told once what it runs with, and whether a pass of such programs may be captured."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.errors import DeviceError
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.engines.tensorrt_plan import Execution, Plan, PlanLoader
from twotower.spec import TensorSpec

__all__ = ["Bound", "ProgramRun", "bind_execution", "may_be_captured"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """A program ready to run; see `RunningProgram`.

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

    @property
    def writes(self) -> Sequence[TensorSpec]:
        return self.plan.part.outputs

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


def may_be_captured(
    programs: Iterable[ProgramRun],
    queue: CudaStream,
    loader: PlanLoader,
    *,
    refused: set[str],
) -> bool:
    """What the library says of a pass, if it does; a refusal is logged once an engine.

    Args:
        programs: Of the pass.
        queue: It would be captured on.
        loader: The library.
        refused: Engines whose refusal was logged; one more is added.
    """
    if not loader.flavour.capturable:
        return True
    for bound in programs:
        loader.drain()
        if not bound.context.is_stream_capturable(queue.handles[bound.device]):
            file, words = bound.plan.part.file, loader.drain() or "it gives no reason"
            if file not in refused:
                what = "%s cannot be captured and is launched piece by piece: %s"
                logger.warning(what, file, words)
            refused.add(file)
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a context is bound to.

    Attributes:
        profile: Number of its optimization profile.
        shapes: Of its inputs, by name.
        addresses: Of its inputs and outputs on its device, by name.
        scratch: Its activation memory, address and bytes.
    """

    profile: int
    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    scratch: tuple[int, int]


def bind_execution(it: Execution, to: Bound, *, loader: PlanLoader, memory: DeviceMemory) -> None:
    """Binds a context; its device is current.

    Raises:
        DeviceError: the library refuses a profile, a shape, an address or the activation memory.
    """
    stream = memory.stream(it.plan.device)
    chosen = it.context.set_optimization_profile_async(to.profile, stream)
    memory.cuda.synchronize(
        stream,
    )  # a profile that is still being set is not there for the next call
    refused = [] if chosen else [f"profile {to.profile}"]
    refused += _not_taken(it, to)
    refused = refused or _without_shape(it) or _without_scratch(it, to.scratch, loader)
    if refused:
        said = loader.drain()
        raise DeviceError(
            f"{it.plan.part.file} cannot be bound",
            found="; ".join(refused[:5]) + (f": {said}" if said else ""),
            do="report this with `twotower doctor`",
        )


def _not_taken(it: Execution, to: Bound) -> Iterator[str]:
    """Sets shapes and addresses; what the library refuses of them."""
    for name, shape in to.shapes.items():
        if not it.context.set_input_shape(name, shape):
            yield f"shape {shape} of {name}"
    for name, address in to.addresses.items():
        if not it.context.set_tensor_address(name, address):
            yield f"address of {name}"


def _without_shape(it: Execution) -> list[str]:
    """Inputs whose shape the library lacks, or why it cannot infer the other shapes from them."""
    try:
        return [f"{name} has no shape" for name in it.context.infer_shapes()]
    except RuntimeError as e:
        return [f"shapes cannot be inferred: {e}"]


def _without_scratch(it: Execution, scratch: tuple[int, int], loader: PlanLoader) -> list[str]:
    """Gives a context its activation memory; what the library does not take it says in its log alone."""
    address, size = scratch
    needed = int(it.context.update_device_memory_size_for_shapes())
    if needed > size:
        return [f"it needs {needed:,} bytes of activation memory, {size:,} were allocated"]
    loader.drain()
    it.context.set_device_memory(address, size)
    said = loader.drain(errors=True)
    return [f"activation memory of {size:,} bytes: {said}"] if said else []
