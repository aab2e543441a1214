"""An engine in TensorRT's execution API that computes with torch, on given addresses and streams.

With it the runtime's CUDA layer (memory, streams, events, passes, captured graphs) runs on any
NVIDIA GPU, whatever TensorRT makes of that GPU. An "engine" is the ONNX graph that TensorRT would
have been given, its constants inside, walked node by node. On `device="cpu"` the same engine runs
over the tests' fake for CUDA, and so it is tested where there is no GPU.

A context has fixed shapes. Its first run works out what depends on shapes and constants alone,
moves constants to the device, and notes the rest as a list of calls; later runs make those only.
Temporaries come from a memory pool of the context's own: a captured run finds the blocks of the run
before it, asks the driver for nothing, and no other work is ever given them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from tools.gpu.torch_operators import HOST, OPERATORS, element_type

__all__ = ["HEADER", "TorchTensorRT", "torch_job"]

HEADER = b"torch engine\n"
_NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
}
_SPARE_MB = (1, 1, 1, 1, 1, 1, 16, 16)
"""Blocks left free in a context's pool: a captured run must not ask the driver for memory."""

_pools: list[Any] = []
"""Kept to the end of the process: a pool must outlive every block that a graph may still use."""

Call = tuple[Callable[..., Any], dict[str, Any], list[Any], list[str]]
"""Function, attributes, arguments (a text names a tensor), names of the results."""


Arrays = dict[str, np.ndarray]
Record = Callable[[bytes, Arrays, Arrays], None]


class TorchTensorRT(SimpleNamespace):
    """The module, in the place of TensorRT for RTX.

    Args:
        device: `cuda:0`, or `cpu` over the tests' fake.
        fake_cuda: The fake of CUDA; None on a GPU.

    Attributes:
        failures: What executions raised; each was then refused, as the library refuses.
        executions: Executions enqueued.
        captures: Those of them that were enqueued while their stream was captured.
        record: Called after each run with the graph, inputs and outputs; None for nobody.
    """

    __name__ = "torch_engine"
    __version__ = "1.0"
    Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE", start=0)
    ILogger = type("ILogger", (), {"Severity": Severity})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", NONE="none")
    ComputeCapability = SimpleNamespace(SM80=80, SM86=86, SM89=89, SM90=90, SM100=100, SM120=120)
    ProfilingVerbosity = SimpleNamespace(NONE="none", DETAILED="detailed")
    IRuntimeCache = object
    IExecutionContext = SimpleNamespace(is_stream_capturable=None)

    def __init__(self, device: str = "cuda:0", fake_cuda: Any = None) -> None:
        super().__init__()
        self.device, self.cuda = torch.device(device), fake_cuda
        self.failures: list[str] = []
        self.executions = self.captures = 0
        self.record: Record | None = None

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - the library's name
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self._engine(bytes(data)))

    def _engine(self, data: bytes) -> _Engine | None:
        return _Engine(self, data.removeprefix(HEADER)) if data.startswith(HEADER) else None


def torch_job(job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
    """In the place of `make_engine.run_job`: writes the graph with its constants as an engine."""
    model = onnx.load_from_string(Path(job["graph"]).read_bytes())
    onnx.load_external_data_for_model(model, str(Path(job["beside"]).parent))
    data = HEADER + model.SerializeToString()
    Path(job["output"]).write_bytes(data)
    observed = {"layers": 1, "by_type": {}, "by_precision": {}, "peak_memory": 1, "log": []}
    return {**observed, "bytes": len(data)}


class _Cache:
    """Kernels compiled so far: there are none."""

    def deserialize(self, data: bytes) -> bool:
        return data == b"none"

    def serialize(self) -> bytes:
        return b"none"


class _Engine:
    """A graph, with its constants on the device once."""

    def __init__(self, trt: TorchTensorRT, graph: bytes) -> None:
        self.trt, self.serialized = trt, graph
        self.graph = onnx.load_from_string(graph).graph
        self.constants = {t.name: _tensor(t) for t in self.graph.initializer}
        self.on_device: dict[str, torch.Tensor] = {}
        inputs = [v for v in self.graph.input if v.name not in self.constants]
        self.inputs = {v.name: element_type(v.type.tensor_type.elem_type) for v in inputs}
        outputs = self.graph.output
        self._shapes = {v.name: _shape(v) for v in (*inputs, *outputs)}
        self.fixed = {v.name: s for v in inputs if -1 not in (s := self._shapes[v.name])}
        self.outputs = {v.name: element_type(v.type.tensor_type.elem_type) for v in outputs}
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.device_memory_size_v2 = len(self._names), 4096

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[(self.inputs | self.outputs)[name]])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present.", "past_key_values.")
        return past if past != name and past in self.inputs else None

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            create_runtime_cache=_Cache,
            set_runtime_cache=lambda cache: True,
            set_execution_context_allocation_strategy=lambda strategy: None,
        )

    def create_execution_context(self, config: Any = None) -> _Context:
        return _Context(self)


class _Context:
    """An execution context for one set of shapes and addresses."""

    def __init__(self, engine: _Engine) -> None:
        self._engine, self._trt = engine, engine.trt
        self._addresses: dict[str, int] = {}
        self._shapes = dict(engine.fixed)
        self._views: dict[str, torch.Tensor] = {}
        self._calls: list[Call] | None = None
        self._known: dict[str, torch.Tensor] = {}
        self._pool = None
        if self._trt.device.type == "cuda":
            self._pool = torch.cuda.MemPool()
            _pools.append(self._pool)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return self._engine.fixed.get(name, tuple(shape)) == tuple(shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        self._views.pop(name, None)
        return name in self._engine.inputs or name in self._engine.outputs

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.inputs if name not in self._shapes]

    def set_device_memory(self, address: int, size: int) -> None:
        """Temporaries come from torch."""

    def update_device_memory_size_for_shapes(self) -> int:
        return self._engine.device_memory_size_v2

    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self._trt.executions += 1
        try:
            if self._pool is None:
                self._trt.cuda.enqueue(stream, self._run)
                return True
            outside = torch.cuda.ExternalStream(stream, device=self._trt.device)
            with torch.cuda.stream(outside), torch.cuda.use_mem_pool(self._pool):
                self._trt.captures += torch.cuda.is_current_stream_capturing()
                self._run()
        except Exception as e:  # noqa: BLE001 - the library would refuse, and say why in its log
            self._trt.failures.append(f"{type(e).__name__}: {str(e)[:300]}")
            return False
        return True

    @torch.no_grad()
    def _run(self) -> None:
        inputs = self._engine.inputs.items()
        values = {name: self._view(name, self._shapes[name], dtype) for name, dtype in inputs}
        record = self._trt.record
        given = {} if record is None else _copied(values)
        if self._calls is None:
            self._calls = self._noted(values)
        else:
            for function, attributes, arguments, results in self._calls:
                given = (values[x] if isinstance(x, str) else x for x in arguments)
                values.update(zip(results, _several(function(attributes, *given)), strict=False))
        for name, dtype in self._engine.outputs.items():
            value = values[name] if name in values else self._placed(name)
            self._view(name, tuple(value.shape), dtype).copy_(value)
        if record is not None:
            made = {name: self._views[name] for name in self._engine.outputs}
            record(self._engine.serialized, given, _copied(made))

    def _noted(self, values: dict[str, torch.Tensor]) -> list[Call]:
        """Runs the graph once, and returns the calls that later runs must make."""
        known, calls = self._known, []
        known.update(self._engine.constants)
        for node in self._engine.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            function, host = OPERATORS[node.op_type], HOST.get(node.op_type, ())
            names = list(node.input)
            while names and not names[-1]:
                names.pop()
            if node.op_type == "Shape" or all(not name or name in known for name in names):
                folded = [
                    self._folded(name, values, as_numbers=i in host) for i, name in enumerate(names)
                ]
                known.update(
                    zip(node.output, _several(function(attributes, *folded)), strict=False)
                )
                continue
            arguments = [
                self._argument(name, values, as_numbers=i in host) for i, name in enumerate(names)
            ]
            given = (values[x] if isinstance(x, str) else x for x in arguments)
            values.update(zip(node.output, _several(function(attributes, *given)), strict=False))
            calls.append((function, attributes, arguments, list(node.output)))
        if self._pool is not None:
            spare = [
                torch.empty(n << 20, dtype=torch.uint8, device=self._trt.device) for n in _SPARE_MB
            ]
            del spare
        return calls

    def _folded(self, name: str, values: dict[str, torch.Tensor], *, as_numbers: bool) -> Any:
        """An input of a node whose result needs no device."""
        if not name:
            return None
        if as_numbers:
            return _numbers(self._known[name])
        return self._known[name] if name in self._known else values[name]

    def _argument(self, name: str, values: dict[str, torch.Tensor], *, as_numbers: bool) -> Any:
        """An input of a call: a name, a constant, or numbers, which must not depend on data."""
        if not name:
            return None
        if as_numbers:
            return _numbers(self._known[name])
        return name if name in values else self._placed(name)

    def _placed(self, name: str) -> torch.Tensor:
        """A constant on the device: those of the graph once an engine."""
        value = self._known[name]
        if name not in self._engine.constants:
            return value.to(self._trt.device)
        if name not in self._engine.on_device:
            self._engine.on_device[name] = value.to(self._trt.device)
        return self._engine.on_device[name]

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if name not in self._views:
            self._views[name] = _at(self._addresses[name], shape, dtype, self._trt.device)
        return self._views[name]


def _copied(tensors: dict[str, torch.Tensor]) -> Arrays:
    """What a recorder keeps; NumPy has no bfloat16, so only graphs without it are recorded."""
    return {name: tensor.detach().cpu().clone().numpy() for name, tensor in tensors.items()}


def _several(result: Any) -> Sequence[torch.Tensor]:
    return result if isinstance(result, tuple | list) else (result,)


def _numbers(value: torch.Tensor) -> list[int]:
    return list(value.reshape(-1).tolist())


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a graph's input or output, -1 for an axis without a size."""
    axes = value.type.tensor_type.shape.dim
    return tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in axes)


def _tensor(proto: Any) -> torch.Tensor:
    if proto.data_type == onnx.TensorProto.BFLOAT16:
        bits = np.frombuffer(proto.raw_data, np.int16).reshape(tuple(proto.dims)).copy()
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(np.array(numpy_helper.to_array(proto)))


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> torch.Tensor:
    """A tensor over memory that belongs to somebody else."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == "cpu":
        memory = (ctypes.c_ubyte * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).reshape(shape)
    interface = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}
    holder = SimpleNamespace(__cuda_array_interface__=interface)
    whole = torch.as_tensor(holder, device=device)
    if whole.data_ptr() != address:
        raise RuntimeError("torch copied memory that was to be shared")
    return whole.view(dtype).reshape(shape)
