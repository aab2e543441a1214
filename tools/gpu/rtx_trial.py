"""One plan of TensorRT for RTX on this GPU, step by step.

    python -m tools.gpu.rtx_trial FOLDER CASE CAPABILITY

Every step is said before it is taken, a line of JSON each: the last line of a trial that dies is
where it died. Of the runtime only its checked CUDA calls are used: what fails here fails in the
library.
"""

from __future__ import annotations

import json
import lzma
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.gpu.plans import PlanOptions, Ranges, build_plan, make_logger
from twotower.doctor.sections import short
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.graphs import capture

__all__ = ["Shapes", "Trial", "fixed_shapes", "plan_file", "try_plan"]

TOLERANCE = 1e-3
"""Relative to the largest value, float32: sums in another order, approximate exp and rsqrt."""

_POISON = 0xA5
_RUNS = 20

Say = Callable[[str, Any], None]
Shapes = dict[str, tuple[int, ...]]


def main(folder: Path, case: str, capability: str) -> int:
    """One trial in a process of its own; 0 if every step was taken."""
    _say("step", "import")
    import tensorrt_rtx as trt
    from cuda.bindings import runtime as cudart

    _say("library", trt.__version__)
    return 0 if try_plan(trt, Cuda(cudart), Trial(folder, case, capability), _say) else 1


@dataclass(frozen=True, slots=True)
class Trial:
    """A case of a folder (`.onnx`, `.npz` with inputs and wanted outputs, plans), a capability."""

    folder: Path
    case: str
    capability: str


def try_plan(trt: Any, cuda: Cuda, trial: Trial, say: Say) -> bool:
    """Loads or builds a plan, runs, compares, captures and replays it; whether it came to the end.

    Args:
        trt: The library.
        cuda: The calls.
        trial: What to try.
        say: Told of every step before it is taken, and of every fact.
    """
    logger = make_logger(trt, lambda line: say("log", line))
    data = np.load(trial.folder / f"{trial.case}.npz")
    given = {name[3:]: data[name] for name in data.files if name.startswith("in.")}
    wanted = {name[4:]: data[name] for name in data.files if name.startswith("out.")}
    plan = _plan(trt, logger, trial, {name: a.shape for name, a in given.items()}, say)
    if plan is None:
        return False
    say("step", "deserialize")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    say("deserialized", engine is not None)
    if engine is None:
        return False
    say("step", "create a context")
    config = engine.create_runtime_config()
    managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    config.set_execution_context_allocation_strategy(managed)
    context = engine.create_execution_context(config)
    say("context", context is not None)
    if context is None:
        return False
    say("step", "bind")
    cuda.use(0)
    bound = _Bound(cuda, engine, context, given=given, wanted=wanted)
    say("bound", bound.accepted)
    _run(bound, say)
    say("step", "done")
    return True


def fixed_shapes(shapes: Shapes) -> Ranges:
    """A profile that admits these shapes alone."""
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def plan_file(trial: Trial) -> Path:
    """Where a prebuilt plan lies, compressed."""
    return trial.folder / f"{trial.case}.{trial.capability}.plan.xz"


def _plan(trt: Any, logger: Any, trial: Trial, shapes: Shapes, say: Say) -> bytes | None:
    """The prebuilt plan, or one built here: for the GPU at hand there can be no other."""
    file = plan_file(trial)
    if file.is_file():
        return lzma.decompress(file.read_bytes())
    say("step", "build here")
    began = time.monotonic()
    graph = (trial.folder / f"{trial.case}.onnx").read_bytes()
    options = PlanOptions(capability=trial.capability, profiles=(fixed_shapes(shapes),))
    plan = build_plan(trt, logger, graph, options)
    say("build_s", short(time.monotonic() - began))
    say("built", plan is not None)
    return None if plan is None else bytes(plan)


class _Bound:
    """A context with memory and a stream, which are freed when the process ends."""

    def __init__(self, cuda: Cuda, engine: Any, context: Any, *, given: Any, wanted: Any) -> None:
        self.cuda, self.context, self.given, self.wanted = cuda, context, given, wanted
        self.stream = cuda.create_stream()
        self._addresses = {name: cuda.allocate(max(256, a.nbytes)) for name, a in given.items()}
        for name, array in wanted.items():
            past = engine.get_aliased_input_tensor(name)
            shared = self._addresses.get(past) if past else None
            self._addresses[name] = shared or cuda.allocate(max(256, array.nbytes))
        largest = max(a.nbytes for a in (*given.values(), *wanted.values()))
        self._host = cuda.allocate_pinned(largest)
        self.accepted = self._bind(max(256, engine.device_memory_size_v2))

    def _bind(self, scratch: int) -> bool:
        context = self.context
        accepted = [bool(context.set_optimization_profile_async(0, self.stream))]
        accepted += [bool(context.set_input_shape(n, a.shape)) for n, a in self.given.items()]
        accepted += [bool(context.set_tensor_address(n, a)) for n, a in self._addresses.items()]
        context.set_device_memory(self.cuda.allocate(scratch), scratch)
        return all(accepted)

    def fill(self) -> None:
        """Inputs as they are given, outputs poisoned: memory that nobody writes must show."""
        for name, array in self.wanted.items():
            self._put(name, np.full(array.nbytes, _POISON, np.uint8))
        for name, array in self.given.items():
            self._put(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def worst(self) -> tuple[str, float]:
        """The output that is furthest from what is wanted, and how far, relative to its largest."""
        return max(
            ((name, _error(self._get(name, a), a)) for name, a in self.wanted.items()),
            key=lambda item: item[1],
        )

    def enqueue(self) -> bool:
        """One execution."""
        return bool(self.context.execute_async_v3(self.stream))

    def _put(self, name: str, data: np.ndarray) -> None:
        np.frombuffer(self.cuda.bytes_at(self._host, data.size), np.uint8)[:] = data
        self.cuda.copy(self._addresses[name], self._host, data.size, stream=self.stream)
        self.cuda.synchronize(self.stream)

    def _get(self, name: str, like: np.ndarray) -> np.ndarray:
        self.cuda.copy(self._host, self._addresses[name], like.nbytes, stream=self.stream)
        self.cuda.synchronize(self.stream)
        seen = np.frombuffer(self.cuda.bytes_at(self._host, like.nbytes), np.uint8)
        return seen.view(like.dtype).reshape(like.shape).copy()


def _run(bound: _Bound, say: Say) -> None:
    say("step", "run")
    bound.fill()
    say("enqueued", bound.enqueue())
    bound.cuda.synchronize(bound.stream)
    name, error = bound.worst()
    say("worst", [name, short(error)])
    say("right", error < TOLERANCE)
    say("step", "time")
    began = time.monotonic()
    for _ in range(_RUNS):
        bound.enqueue()
    bound.cuda.synchronize(bound.stream)
    say("ms_a_run", short((time.monotonic() - began) / _RUNS * 1000))
    say("step", "capture")
    say("capturable", bool(bound.context.is_stream_capturable(bound.stream)))
    enqueued = []
    graph = capture(
        bound.cuda, bound.stream, lambda: enqueued.append(bound.enqueue()), name="the plan"
    )
    say("enqueued_in_capture", enqueued == [True])
    say("captured", graph is not None)
    if graph is None:
        return
    bound.fill()
    bound.cuda.launch(graph, stream=bound.stream)
    bound.cuda.synchronize(bound.stream)
    say("replay_right", bound.worst()[1] < TOLERANCE)
    bound.cuda.destroy_graph(graph)


def _error(seen: np.ndarray, wanted: np.ndarray) -> float:
    if wanted.dtype.kind != "f":
        return float((seen != wanted).mean())
    if not np.isfinite(seen).all():
        return float("inf")
    return float(np.abs(seen - wanted).max(initial=0) / max(1.0, np.abs(wanted).max(initial=0)))


def _say(name: str, value: Any) -> None:
    print(json.dumps({name: value}), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
