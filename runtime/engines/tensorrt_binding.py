"""An execution context told what it runs with, once: profile, shapes, addresses, activation memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from twotower.errors import DeviceError
from twotower.runtime.cuda.memory import DeviceMemory
from twotower.runtime.engines.tensorrt_plan import Execution, PlanLoader

__all__ = ["Bound", "bind_execution"]


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
