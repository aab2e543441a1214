"""Two builds of one bundle, opened side by side: passes in turns, and their results compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import quantiles
from typing import Any, cast

import numpy as np

from tools.gpu.passes import WARM, Pass, capacity_of, passes
from twotower.bundle import Bundle
from twotower.hardware import probe_machine
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer, DeviceMemory
from twotower.runtime.device import Array, Event, Memory
from twotower.runtime.engines import OpenOptions
from twotower.runtime.engines.trt_engine import open_tensorrt
from twotower.runtime.workspace import Workspace
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TensorSpec
from twotower.tensorrt_library import Variant

__all__ = ["Difference", "OpenForm", "compared", "in_turns"]

_LEAST, _MOST, _SECONDS = 5, 100, 1.0
"""Timed runs of each form, of each pass."""


class _SeenMemory:
    """A session's memory, and the buffers that stay on the device, in the order they were made."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self.seen: list[tuple[str, DeviceBuffer]] = []

    def state(self, spec: TensorSpec, sizes: Mapping[str, int]) -> DeviceBuffer:
        buffer = self._memory.state(spec, sizes)
        self.seen.append((spec.name, buffer))
        return buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)


class OpenForm:
    """The engines of one form, opened as the runtime opens them.

    Args:
        bundle: Its bundle, with engines for the library.
        variant: The library.
        cuda: The calls.
        graphs: Whether passes are captured.

    Attributes:
        seconds: It took to open.
        opened_bytes: Of the device, taken by opening: engines and weights.
        pass_bytes: Of the device, taken by the first runs of passes so far: contexts and graphs.
        first_seconds: What the first runs of passes took beyond those after them.

    Raises:
        EngineMismatchError: the engines do not fit the library, the GPU or its memory.
    """

    def __init__(self, bundle: Bundle, variant: Variant, cuda: Cuda, *, graphs: bool) -> None:
        machine = probe_machine()
        options = OpenOptions(
            devices=(0,), graphs=graphs, gpus=machine.gpus, any_sm=machine.rtx_any_sm
        )
        self._cuda, began = cuda, time.monotonic()
        cuda.use(0)
        before = cuda.free_memory()[0]
        towers = open_tensorrt(bundle, variant, cuda, options)
        self.opened_bytes, self.pass_bytes = before - self._free(), 0
        self.seconds, self.first_seconds = time.monotonic() - began, 0.0
        self._memory = _SeenMemory(cast(DeviceMemory, towers.memory))
        self._towers = replace(towers, memory=cast(Memory, self._memory))
        self._work: Workspace | None = None

    def passes(self, rows: int) -> Iterator[Pass]:
        """Every pass of every graph on new buffers; the denoiser reads what the context wrote."""
        self._let_go()
        self._memory.seen.clear()
        work = Workspace(self._towers, rows=rows, capacity=capacity_of(self._towers))
        self._work = work
        graphs = (CONTEXT, CONTEXT_HEAD, DENOISER)
        return chain.from_iterable(passes(work, self._towers, graph) for graph in graphs)

    def warm(self, one: Pass) -> None:
        """Runs a pass until it is bound, compiled and captured."""
        before, times = self._free(), []
        for _ in range(WARM):
            began = time.monotonic()
            one.run().wait_done()
            times.append(time.monotonic() - began)
        self.pass_bytes += before - self._free()
        self.first_seconds += sum(times) - len(times) * min(times)

    def take_state(self, other: OpenForm) -> None:
        """Makes all that passes read and write on the device what it is in the other form."""
        stream = self._memory.stream(0)
        for (_, own), (_, theirs) in zip(self._memory.seen, other._memory.seen, strict=True):
            self._cuda.copy(own.addresses[0], theirs.addresses[0], own.nbytes, stream=stream)
        self._cuda.synchronize(stream)

    def results(self, one: Pass) -> Iterator[tuple[str, Array]]:
        """All that a pass may have written, by name: for the host, and on the device."""
        yield from one.outputs.items()
        for name, buffer in self._memory.seen:
            yield name, _numbers(self._bytes(buffer), buffer.dtype)

    def close(self) -> None:
        """Frees everything."""
        self._let_go()
        self._towers.close()

    def _let_go(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work.close()

    def _bytes(self, buffer: DeviceBuffer) -> Array:
        host, stream = self._cuda.allocate_pinned(buffer.nbytes), self._memory.stream(0)
        self._cuda.copy(host, buffer.addresses[0], buffer.nbytes, stream=stream)
        self._cuda.synchronize(stream)
        data = np.frombuffer(self._cuda.bytes_at(host, buffer.nbytes), np.uint8).copy()
        self._cuda.free_pinned(host)
        return data

    def _free(self) -> int:
        return self._cuda.free_memory()[0]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the results of one pass are apart in two forms.

    Attributes:
        apart: Of each result that is not the same to the bit: the largest difference, and the
            largest number of the first form to hold it against. Of tokens: how many differ, of how
            many.
        finite: Whether all numbers of both are finite.
    """

    apart: dict[str, tuple[float, float]]
    finite: bool

    def __str__(self) -> str:
        note = "" if self.finite else "; not all finite"
        if not self.apart:
            return f"equal{note}"
        name, (most, of) = max(self.apart.items(), key=lambda item: item[1][0] / (item[1][1] or 1))
        return f"{len(self.apart)} differ, {name} by {most:.3g} of {of:.3g}{note}"


def compared(one: OpenForm, other: OpenForm, same: tuple[Pass, Pass]) -> Difference:
    """Runs a pass in both forms, from the state of the first, and compares all that it wrote.

    Args:
        one: The first form.
        other: The second.
        same: The pass in each.
    """
    other.take_state(one)
    for run in (same[0].run, same[1].run):
        run().wait_done()
    apart: dict[str, tuple[float, float]] = {}
    finite = True
    for (name, a), (_, b) in zip(one.results(same[0]), other.results(same[1]), strict=True):
        is_float = a.dtype.kind == "f"
        finite = finite and not (is_float and not (np.isfinite(a).all() and np.isfinite(b).all()))
        if a.tobytes() == b.tobytes():
            continue
        found = (
            (_most(a.astype(np.float64) - b), _most(a))
            if is_float
            else (float(np.count_nonzero(a != b)), float(a.size))
        )
        apart[name] = max(found, apart.get(name, found))  # a state has two buffers of one name
    return Difference(apart, finite)


def in_turns(runs: Sequence[Callable[[], Event]]) -> list[tuple[float, float, float]]:
    """Milliseconds of passes that are waited for, first one form, then the other, then other first.

    Returns:
        The quartiles of each: a quarter of its runs was faster than the first, the second is the
        median.
    """
    times: list[list[float]] = [[] for _ in runs]
    order, end = list(range(len(runs))), time.monotonic() + _SECONDS
    while len(times[0]) < _MOST and (len(times[0]) < _LEAST or time.monotonic() < end):
        for i in order:
            began = time.perf_counter()
            runs[i]().wait_done()
            times[i].append(1000 * (time.perf_counter() - began))
        order.reverse()
    return [cast(tuple[float, float, float], tuple(quantiles(some, n=4))) for some in times]


def _numbers(data: Array, dtype: str) -> Array:
    """Bytes of a buffer as numbers; bfloat16 as float32, whose upper half it is."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(dtype)


def _most(numbers: Array) -> float:
    """The largest size of a number that is one."""
    return float(np.nanmax(np.abs(numbers), initial=0.0))
