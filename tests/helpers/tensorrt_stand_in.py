"""A TensorRT without a GPU: its execution API over the CUDA stand-in, computing with ONNX Runtime on the CPU.

An "engine" is the very graph TensorRT would have been given, so what the runtime binds, orders and
hands over decides whether the numbers are right. An execution has a beginning, which marks the
scratch memory, and an end, which finds its own mark or another's. It works with what its context
was told when it was enqueued or captured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.kernel_stand_in import write_kernels
from tests.helpers.stand_in_engine import Engine
from tests.helpers.stand_in_graph import StandInGraph
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.kernels import ExpertShape, Manifest
from twotower.tensorrt_library import flavour_from_module

__all__ = ["StandInBuilder", "TensorRTStandIn"]

_HEADER = b"stand-in engine\n"


class _Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Logger:
    Severity = _Severity


_FIRST_LOGGER: dict[str, Any] = {}
"""A process has one: the library keeps the first it is given and says nothing to any other."""


class TensorRTStandIn(SimpleNamespace):
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

    __name__ = "tensorrt_stand_in"
    __version__ = "1.0"
    ILogger = _Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", NONE="none")
    ComputeCapability = SimpleNamespace(SM86=86, SM89=89, SM120=120)
    IRuntimeCache = object
    IExecutionContext = SimpleNamespace(is_stream_capturable=None)
    ProfilingVerbosity = SimpleNamespace(NONE="none", DETAILED="detailed")

    def __init__(self, cuda: CudaStandIn) -> None:
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
        computes = StandInGraph(graph, Path(about["beside"]).parent)
        return Engine(self, computes, about, lambda said: logger.log(_Severity.ERROR, said))


class StandInBuilder(TensorRTBuilder):
    """The builder that ships, with compilers that keep the graph, and the kernels' names, as they are."""

    def __init__(self, module: TensorRTStandIn) -> None:
        super().__init__(flavour_from_module(module), stand_in_kernels)


def stand_in_kernels(shape: ExpertShape, sms: Sequence[int], folder: Path, **_: Any) -> Manifest:
    """In the place of `compile_kernels`."""
    return write_kernels(folder, shape, sms)


def stand_in_job(job: dict[str, Any], scratch: Path, *, tick: Any) -> dict[str, Any]:
    """In the place of `builders.job.run_job`: the "engine" is the graph and where its weights lie."""
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
