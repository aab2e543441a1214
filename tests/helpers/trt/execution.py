"""The execution API of a fake TensorRT over the fake CUDA, computing with ONNX Runtime on the CPU.

An "engine" is the very graph TensorRT would have been given, so what the runtime binds, orders and
hands over decides whether the numbers are right. An execution has a beginning, which marks the
scratch memory, and an end, which finds its own mark or another's. It works with what its context
was told when it was enqueued or captured.

What is refused is said in the log and with False, as by the library: shapes outside a profile, a
profile that is not there yet, scratch memory that is too small or not aligned (the log alone
tells), aliases at two addresses, an execution without one of these. An execution in a shape that
has not run yet asks CUDA for memory, and compiles kernels where it was told to specialise them.
"""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.fake_cuda import CudaRefusedError, FakeCuda
from tests.helpers.fake_kernels import write_kernels
from tests.helpers.trt.host_graph import HostGraph, view
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.kernels import ExpertShape, Manifest
from twotower.tensorrt_library import variant_from_module

__all__ = [
    "SCRATCH",
    "Context",
    "Engine",
    "FakeBuilder",
    "FakeTensorRT",
    "engines_changed",
    "fake_job",
    "fake_kernels",
]

_collecting = threading.Event()
gc.callbacks.append(
    lambda phase, info: _collecting.set() if phase == "start" else _collecting.clear()
)

SCRATCH = 4096
_ALIGNED = 256


class _Cache:
    """Compiled kernels, by name."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def deserialize(self, data: bytes) -> bool:
        try:
            self.known = json.loads(data)
        except ValueError:
            return False
        return True

    def serialize(self) -> memoryview:
        return memoryview(json.dumps(self.known).encode())


class _Config:
    """How a context is to be made; it does not keep the cache alive, nor a context either."""

    def __init__(self) -> None:
        self.strategy = "static"
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = ""
        self.cache: Callable[[], _Cache | None] = lambda: None

    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self.cache = weakref.ref(cache)
        return True

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class Engine:
    """One engine.

    Args:
        trt: The module it was loaded by.
        graph: What it computes.
        build: Its inputs with their axes, and its profiles, as the build was told.
        log: Called with the library's words.

    Attributes:
        device_memory_size_v2: Bytes of scratch memory it says it needs.
    """

    def __init__(
        self,
        trt: Any,
        graph: HostGraph,
        build: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self.trt, self.graph, self.say = trt, graph, log
        self.axes = {name: axes for name, _, axes in build["inputs"]}
        self.profiles = [profile["axes"] for profile in build["profiles"]]
        self._names = [*graph.inputs, *graph.outputs]
        self.num_io_tensors = len(self._names)
        self.device_memory_size_v2 = SCRATCH
        self.device = trt.cuda.current

    @property
    def name(self) -> str:
        """What tells it from other engines."""
        return ",".join(sorted(self.graph.outputs))[:40]

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        kind = (self.graph.inputs | self.graph.outputs)[name]
        return SimpleNamespace(name={"FLOAT16": "HALF", "BFLOAT16": "BF16"}.get(kind, kind))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self.graph.shapes[name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present.", "past_key_values.")
        return past if past != name and past in self.graph.inputs else None

    def create_runtime_config(self) -> _Config:
        return _Config()

    def create_execution_context(self, config: _Config) -> Context:
        assert config.strategy == "user", "contexts share one scratch memory"
        return Context(self, config)


class Context:
    """One execution context."""

    nvtx_verbosity = "detailed"

    def __init__(self, engine: Engine, config: _Config) -> None:
        self._engine, self._trt = engine, engine.trt
        self._config, self._cache = weakref.ref(config), config.cache
        self._specialised = config.dynamic_shapes_kernel_specialization_strategy == "eager"
        self._profile: int | None = None
        self._addresses: dict[str, int] = {}
        known = engine.graph.shapes.items()  # a weight's shape is not set: it is the engine's own
        self._shapes = {
            name: tuple(a) for name, a in known if not any(isinstance(n, str) for n in a)
        }
        self._scratch = 0
        self._prepared: dict[str, tuple[int, ...]] = {}
        self._trt.made += 1
        self._compiled("any shape")

    def __del__(self) -> None:
        if (
            _collecting.is_set()
        ):  # in an order of its own, which the library's objects do not follow
            return
        if self._config() is None or self._cache() is None:
            self._trt.faults.append("a context outlived its configuration or its cache")

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._trt.changes += 1
        if not 0 <= index < len(self._engine.profiles):
            return False
        self._profile = None
        context = weakref.ref(self)  # a stream's past is no reason to live on

        def chosen() -> None:
            if (it := context()) is not None:
                it._profile = index

        self._trt.cuda.enqueue(stream, chosen)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._trt.changes += 1
        axes = self._engine.axes[name]
        fits = self._profile is not None and len(axes) == len(shape)
        if fits:
            ranges = self._engine.profiles[self._profile]
            allowed = [
                ranges.get(a, (1, 1, 1 << 40)) if isinstance(a, str) else (a, a, a) for a in axes
            ]
            fits = all(
                least <= n <= most for n, (least, _, most) in zip(shape, allowed, strict=True)
            )
        if not fits:
            self._engine.say(f"shape {shape} of {name} is outside of profile {self._profile}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._trt.changes += 1
        where = self._trt.cuda.device_of(address)
        assert where == self._engine.device, f"{name} is on another device than the engine"
        self._addresses[name] = address
        return name in self._engine.graph.inputs or name in self._engine.graph.outputs

    def infer_shapes(self) -> list[str]:
        if self._trt.inference_fails:
            raise RuntimeError("shape inference failed")
        return [name for name in self._engine.graph.inputs if name not in self._shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes(), "shapes come first"
        return self._trt.scratch_for_shapes or self._engine.device_memory_size_v2

    def set_device_memory(self, address: int, size: int) -> None:
        self._trt.changes += 1
        if size < self._engine.device_memory_size_v2 or address % _ALIGNED:
            self._engine.say(f"device memory of {size} bytes at {address:#x} cannot be used")
            return
        self._scratch = address

    def is_stream_capturable(self, stream: int) -> bool:
        if not self._trt.capturable:
            self._engine.say("this engine is not stream capturable")
        return self._trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt = self._trt
        trt.executions += 1
        if trt.executions == trt.refuse_at or (trt.refuse_capture and trt.cuda.capturing(stream)):
            return False
        wrong = self._refusal()
        if wrong:
            self._engine.say(wrong)
            return False
        trt.log.append(f"execute {self._engine.name}")
        work = _Execution(
            self._engine.graph,
            dict(self._addresses),
            dict(self._shapes),
            self._scratch,
        )
        try:
            trt.cuda.enqueue(stream, work.begin)
            (trt.cuda.enqueue_aside if trt.hidden_streams else trt.cuda.enqueue)(stream, work.end)
        except CudaRefusedError as e:
            self._engine.say(f"CUDA error {e.code} while it was enqueued")
            return False
        return True

    def _refusal(self) -> str:
        """Why it cannot be enqueued; empty if it can, and then it is ready for its shape."""
        engine, trt = self._engine, self._trt
        assert self._config() is not None and self._cache() is not None, (
            "configuration or cache are gone"
        )
        bound = {*engine.graph.inputs, *engine.graph.outputs}
        if set(self._addresses) != bound or self._profile is None or not self._scratch:
            return "an address, the profile or the device memory is not set"
        for name in engine.graph.outputs:
            past = engine.get_aliased_input_tensor(name)
            if past and self._addresses[name] != self._addresses[past]:
                return f"{name} and {past} should alias but memory addresses differ"
            if not past and self._addresses[name] in {
                self._addresses[other] for other in engine.graph.inputs
            }:
                return f"{name} is written where an input is read"
        engine.graph.check(self._addresses, self._shapes, trt.cuda.device_of)
        if self._shapes == self._prepared and not trt.allocates:
            return ""
        if code := trt.cuda.unsafe():
            return f"cudaMalloc during capture: {code}"
        self._prepared = dict(self._shapes)
        if self._specialised:
            self._compiled(str(sorted(self._shapes.items())))
        return ""

    def _compiled(self, what: str) -> None:
        """Kernels are in the cache, or are compiled now."""
        cache, name = self._cache(), f"{self._engine.name}: {what}"
        assert cache is not None, "the cache is gone"
        if name not in cache.known:
            cache.known.append(name)
            self._trt.kernels.append(name)


@dataclass(frozen=True, eq=False)
class _Execution:
    """What was enqueued: kernels and captured graphs keep the addresses of that moment."""

    graph: HostGraph
    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    scratch: int

    def begin(self) -> None:
        view(self.scratch, (1,), np.int64)[0] = id(self)

    def end(self) -> None:
        own = view(self.scratch, (1,), np.int64)[0] == id(self)
        assert own, "two executions used the scratch memory at a time"
        self.graph.run(self.addresses, self.shapes)


_HEADER = b"fake engine\n"


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Logger:
    Severity = _Severity


_FIRST_LOGGER: dict[str, Any] = {}
"""A process has one: the library keeps the first it is given and says nothing to any other."""


class FakeTensorRT(SimpleNamespace):
    """The module.

    Args:
        cuda: What it enqueues on.

    Attributes:
        refuse_at: Number of the execution that is refused, counted from 1; 0 for none. Likewise
        refuse_capture: while a stream is captured.
        capturable: What it says when it is asked whether a stream can be captured.
        allocates: Every execution asks CUDA for memory, and not only the first in a shape.
        hidden_streams: Executions end on a stream of the library's own, joined by events.
        inference_fails: Shapes cannot be inferred.
        scratch_for_shapes: Bytes of scratch memory for the shapes of a context; 0 for what the
            engine says.
        log: What was executed, in order.
        kernels: What was compiled, in order.
        made: Execution contexts made.
        changes: Addresses, shapes, profiles and memory set in them.
        faults: What was found that a process might not survive.
    """

    __name__ = "fake_tensorrt"
    __version__ = "1.0"
    ILogger = _Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", NONE="none")
    ComputeCapability = SimpleNamespace(SM86=86, SM89=89, SM120=120)
    IRuntimeCache = object
    IExecutionContext = SimpleNamespace(is_stream_capturable=None)
    ProfilingVerbosity = SimpleNamespace(NONE="none", DETAILED="detailed")

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.refuse_at, self.refuse_capture, self.capturable = 0, False, True
        self.allocates = self.hidden_streams = self.inference_fails = False
        self.scratch_for_shapes = 0
        self.executions = self.made = self.changes = 0
        self.log: list[str] = []
        self.kernels: list[str] = []
        self.faults: list[str] = []

    def Runtime(self, logger: Any) -> Any:
        first = _FIRST_LOGGER.setdefault(self.__name__, logger)
        return SimpleNamespace(
            deserialize_cuda_engine=lambda data: self._engine(bytes(data), first)
        )

    def _engine(self, data: bytes, logger: Any) -> Engine | None:
        if not data.startswith(_HEADER):
            logger.log(_Severity.ERROR, "the magic tag does not match")
            return None
        build, _, graph = data.removeprefix(_HEADER).partition(b"\n")
        about = json.loads(build)
        computes = HostGraph(graph, Path(about["beside"]).parent)
        return Engine(self, computes, about, lambda said: logger.log(_Severity.ERROR, said))


def engines_changed(change: Callable[[Any], None]) -> Callable[[FakeTensorRT], None]:
    """For a library whose engines are not what was built: `change` is called with each."""

    def change_library(trt: FakeTensorRT) -> None:
        make = trt._engine

        def changed(data: bytes, logger: Any) -> Any:
            engine = make(data, logger)
            change(engine)
            return engine

        trt._engine = changed

    return change_library


class FakeBuilder(TensorRTBuilder):
    """The builder that ships, with compilers that keep the graph and the kernels' names."""

    def __init__(self, module: FakeTensorRT) -> None:
        super().__init__(variant_from_module(module), fake_kernels)


def fake_kernels(shape: ExpertShape, sms: Sequence[int], folder: Path, **_: Any) -> Manifest:
    """In the place of `compile_kernels`."""
    return write_kernels(folder, shape, sms)


def fake_job(job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
    """In the place of `make_engine.run_job`: the "engine" is the graph and its weights' place."""
    about = {key: job[key] for key in ("beside", "inputs", "profiles")}
    Path(job["output"]).write_bytes(
        _HEADER + json.dumps(about).encode() + b"\n" + Path(job["graph"]).read_bytes()
    )
    return {
        "layers": 1,
        "by_type": {},
        "by_precision": {},
        "peak_memory": 1,
        "bytes": Path(job["output"]).stat().st_size,
        "log": [],
    }
