"""A TensorRT without a GPU: its execution API over the CUDA stand-in, computing with ONNX Runtime on the CPU.

An "engine" is the very graph TensorRT would have been given, so what the runtime binds, orders and hands over decides whether the numbers
are right. An execution has a beginning, which marks the scratch memory, and an end, which finds its own
mark or another's. It works with what its context was told when it was enqueued or captured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.cuda_stand_in import CudaRefusedError, CudaStandIn
from tests.helpers.stand_in_graph import StandInGraph, view
from twotower.builders.tensorrt_builder import TensorRTBuilder
from twotower.flavour import flavour_from_module

__all__ = ["StandInBuilder", "TensorRTStandIn"]

_HEADER = b"stand-in engine\n"
SCRATCH = 4096


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Logger:
    Severity = _Severity


class TensorRTStandIn(SimpleNamespace):
    """The module.

    Args:
        cuda: What it enqueues on.

    Attributes:
        refuse_at: Number of the execution that is refused, counted from 1; 0 for none. Likewise
        refuse_capture: while a stream is captured.
        allocates: Every execution asks CUDA for memory, which a capture forbids and which breaks it.
        log: What was done, in order.
        kernels: Grows by one whenever kernels are compiled.
        contexts: Every execution context made.
    """

    __name__ = "tensorrt_stand_in"
    __version__ = "1.0"
    ILogger = _Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", NONE="none")
    ComputeCapability = SimpleNamespace(SM86=86, SM89=89, SM120=120)
    IRuntimeCache = object
    IExecutionContext = SimpleNamespace(is_stream_capturable=None)

    def __init__(self, cuda: CudaStandIn) -> None:
        super().__init__()
        self.cuda = cuda
        self.refuse_at, self.refuse_capture, self.capturable = 0, False, True
        self.allocates = False
        self.executions = 0
        self.log: list[str] = []
        self.kernels: list[bytes] = []
        self.contexts: list[_Context] = []

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(bytes(data), logger))

    def _engine(self, data: bytes, logger: Any) -> _Engine | None:
        if not data.startswith(_HEADER):
            logger.log(_Severity.ERROR, "the magic tag does not match")
            return None
        return _Engine(self, data.removeprefix(_HEADER), logger)


class StandInBuilder(TensorRTBuilder):
    """The builder that ships, with a compiler that keeps the graph as it is."""

    def __init__(self, module: TensorRTStandIn) -> None:
        super().__init__(flavour_from_module(module))


def stand_in_job(job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
    """In the place of `builders.job.run_job`: the "engine" is the graph and where its weights lie."""
    about = {key: job[key] for key in ("beside", "inputs")}
    Path(job["output"]).write_bytes(_HEADER + json.dumps(about).encode() + b"\n" + Path(job["graph"]).read_bytes())
    return {"layers": 1, "by_type": {}, "by_precision": {}, "peak_memory": 1, "bytes": Path(job["output"]).stat().st_size, "log": []}


class _Cache:
    """Kernels compiled so far: made by the first execution context, unless they were read."""

    def __init__(self) -> None:
        self.data = b""

    def deserialize(self, data: bytes) -> bool:
        self.data = data
        return data == b"kernels"

    def serialize(self) -> bytes:
        return self.data


class _Engine:
    def __init__(self, trt: TensorRTStandIn, data: bytes, logger: Any) -> None:
        header, _, graph = data.partition(b"\n")
        self.trt, self.logger = trt, logger
        self.graph = StandInGraph(graph, Path(json.loads(header)["beside"]).parent)
        self._names = [*self.graph.inputs, *self.graph.outputs]
        self.num_io_tensors = len(self._names)
        self.device_memory_size_v2 = SCRATCH
        self.device = trt.cuda.current

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        kind = (self.graph.inputs | self.graph.outputs)[name]
        return SimpleNamespace(name={"FLOAT16": "HALF", "BFLOAT16": "BF16"}.get(kind, kind))

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present.", "past_key_values.")
        return past if past != name and past in self.graph.inputs else None

    def create_runtime_config(self) -> Any:
        def set_strategy(strategy: str) -> None:
            config.strategy = strategy

        def set_cache(cache: Any) -> bool:
            config.cache = cache
            return True

        config = SimpleNamespace(
            create_runtime_cache=_Cache,
            set_runtime_cache=set_cache,
            set_execution_context_allocation_strategy=set_strategy,
            strategy="static",
        )
        return config

    def create_execution_context(self, config: Any) -> _Context:
        assert config.strategy == "user", "contexts share one scratch memory"
        if not config.cache.data:
            config.cache.data = b"kernels"
            self.trt.kernels.append(b"kernels")
        context = _Context(self, config)
        self.trt.contexts.append(context)
        return context


class _Context:
    """One execution context.

    Attributes:
        changes: Addresses, shapes and profiles set; a pass in a loop sets none.
    """

    def __init__(self, engine: _Engine, config: Any) -> None:
        self._engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch = 0
        self.changes = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.changes += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.changes += 1
        fixed = self._engine.graph.shapes[name]
        self._shapes[name] = tuple(shape)
        return len(fixed) == len(shape) and all(isinstance(a, str) or a == b for a, b in zip(fixed, shape, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        assert self._engine.trt.cuda.device_of(address) == self._engine.device, f"{name} is on another device than the engine"
        self.addresses[name] = address
        return name in self._engine.graph.inputs or name in self._engine.graph.outputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.graph.inputs if name not in self._shapes]

    def set_device_memory(self, address: int, size: int) -> None:
        self.changes += 1
        assert size >= SCRATCH and address % 256 == 0
        self._scratch = address

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt = self._engine.trt
        assert set(self.addresses) == {*self._engine.graph.inputs, *self._engine.graph.outputs}, "every tensor is bound"
        trt.executions += 1
        if trt.executions == trt.refuse_at or (trt.refuse_capture and trt.cuda.capturing(stream)):
            return False
        if trt.allocates and (code := trt.cuda.unsafe()):
            said = f"cudaMalloc during capture: {code}"
            self._engine.logger.log(_Severity.ERROR, said)
            return False
        trt.log.append(f"execute {','.join(sorted(self._engine.graph.outputs))[:40]}")
        self._engine.graph.check(self.addresses, self._shapes, trt.cuda.device_of)
        work = _Execution(self._engine.graph, dict(self.addresses), dict(self._shapes), self._scratch)
        try:
            trt.cuda.enqueue(stream, work.begin)
            trt.cuda.enqueue(stream, work.end)
        except CudaRefusedError as e:
            said = f"CUDA error {e.code} while it was enqueued"
            self._engine.logger.log(_Severity.ERROR, said)
            return False
        return True


@dataclass(frozen=True, eq=False)
class _Execution:
    """What was enqueued: kernels, and graphs that captured them, hold the addresses and shapes of that moment."""

    graph: StandInGraph
    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    scratch: int

    def begin(self) -> None:
        view(self.scratch, (1,), np.int64)[0] = id(self)

    def end(self) -> None:
        assert view(self.scratch, (1,), np.int64)[0] == id(self), "two executions used the scratch memory at a time"
        self.graph.run(self.addresses, self.shapes)
