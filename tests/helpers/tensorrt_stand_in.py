"""A TensorRT without a GPU: its execution API over the CUDA stand-in, computing with ONNX Runtime on the CPU.

An "engine" is the very graph TensorRT would have been given, so what the runtime binds, orders and hands over decides whether the numbers
are right. An execution has a beginning, which marks the scratch memory, and an end, which finds its own mark or another's. It works
with what its context was told when it was enqueued, as kernels do and graphs that captured them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.helpers.cuda_stand_in import CudaStandIn
from twotower.builders.tensorrt_builder import TensorRTBuilder
from twotower.flavour import flavour_from_module

__all__ = ["StandInBuilder", "TensorRTStandIn"]

_HEADER = b"stand-in engine\n"
_DTYPES = {"float32": ("FLOAT", np.float32), "float16": ("HALF", np.float16), "int64": ("INT64", np.int64)}
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
        return _Engine(self, data.removeprefix(_HEADER))


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
    def __init__(self, trt: TensorRTStandIn, data: bytes) -> None:
        header, _, graph = data.partition(b"\n")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        folder = str(Path(json.loads(header)["beside"]).parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self.trt = trt
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = {o.name: o for o in self.session.get_outputs()}
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self._names)
        self.device_memory_size_v2 = SCRATCH
        self.device = trt.cuda._current

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
        return SimpleNamespace(name=kinds[(self.inputs | self.outputs)[name].type])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present.", "past_key_values.")
        return past if past != name and past in self.inputs else None

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
        fixed = self._engine.inputs[name].shape
        self._shapes[name] = tuple(shape)
        return len(fixed) == len(shape) and all(isinstance(a, str) or a == b for a, b in zip(fixed, shape, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        assert self._engine.trt.cuda.device_of(address) == self._engine.device, f"{name} is on another device than the engine"
        self.addresses[name] = address
        return name in self._engine.inputs or name in self._engine.outputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def set_device_memory(self, address: int, size: int) -> None:
        self.changes += 1
        assert size >= SCRATCH and address % 256 == 0
        self._scratch = address

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        trt = self._engine.trt
        assert set(self.addresses) == {*self._engine.inputs, *self._engine.outputs}, "every tensor is bound"
        trt.executions += 1
        if trt.executions == trt.refuse_at or (trt.refuse_capture and trt.cuda.capturing(stream)):
            return False
        trt.log.append(f"execute {','.join(sorted(self._engine.outputs))[:40]}")
        work = _Execution(self._engine, dict(self.addresses), dict(self._shapes), self._scratch)
        trt.cuda.enqueue(stream, work.begin)
        trt.cuda.enqueue(stream, work.end)
        return True


@dataclass(frozen=True, eq=False)
class _Execution:
    """What was enqueued: kernels hold the addresses, shapes and scratch memory of that moment, and a captured graph replays them.

    Whatever a context is told later is for later executions.
    """

    engine: _Engine
    addresses: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    scratch: int

    def begin(self) -> None:
        _view(self.scratch, (1,), np.int64)[0] = id(self)

    def end(self) -> None:
        assert _view(self.scratch, (1,), np.int64)[0] == id(self), "two executions used the scratch memory at a time"
        given = {name: _view(self.addresses[name], self.shapes[name], _type(i.type)) for name, i in self.engine.inputs.items()}
        for (name, spec), value in zip(self.engine.outputs.items(), self.engine.session.run(None, given), strict=True):
            np.copyto(_view(self.addresses[name], value.shape, _type(spec.type)), value)


def _type(name: str) -> Any:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}[name]


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    import ctypes

    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)
