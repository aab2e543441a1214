"""A fake of `tensorrt` 11.4 with the API that builders use; it compiles nothing.

It has what only the full library has (a timing cache that works) and lacks what only TensorRT for
RTX has (`ComputeCapability`, `num_compute_capabilities`), so that code which takes one for the
other fails. `tests/builders/trt/test_network.py` holds its names against the real bindings. A graph
chooses what happens by its operators: `Refuse`, `RefuseBuild`, `Ignore`, `Crash`, `Raise`.

It is loaded by path and not imported: a copy named `tensorrt/__init__.py` is what a child process
finds (`install_fake`).
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import signal
import time
from typing import Any

import onnx

__version__ = "11.4.0.106"

SECONDS = float(os.environ.get("FAKE_TENSORRT_SECONDS", "0"))
"""How long a build takes."""


class BuilderFlag(enum.Enum):
    TF32 = 0
    DEBUG = 1


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0
    DETAILED = 1


class LayerInformationFormat(enum.Enum):
    ONELINE = 0
    JSON = 1


class LayerType(enum.Enum):
    OTHER = 0
    MATRIX_MULTIPLY = 1
    KV_CACHE_UPDATE = 2
    ATTENTION_INPUT = 3


class DataType(enum.Enum):
    FLOAT = 0


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class ITensor:
    dtype = DataType.FLOAT


class IAttention:
    decomposable = False


class ILayer:
    num_outputs = 1

    def __init__(self, kind: LayerType) -> None:
        self.type = kind
        self.attention = IAttention()

    def get_output(self, index: int) -> ITensor:
        return ITensor()


class IAttentionBoundaryLayer(ILayer):
    pass


class INetworkDefinition:
    def __init__(self) -> None:
        self.layers: list[ILayer] = []
        self.ops: list[str] = []
        self.digest = ""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> ILayer:
        return self.layers[index]


class _Error:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[_Error] = []

    def parse(self, model: bytes, path: str | None = None) -> bool:
        graph = onnx.load_from_string(model).graph
        assert path is not None
        assert os.path.isfile(path), "weights are found from here"
        kinds = {
            "MatMul": LayerType.MATRIX_MULTIPLY,
            "TensorScatter": LayerType.KV_CACHE_UPDATE,
            "Attention": LayerType.ATTENTION_INPUT,
        }
        self._network.ops = [node.op_type for node in graph.node]
        self._network.layers = [ILayer(kinds.get(op, LayerType.OTHER)) for op in self._network.ops]
        self._network.digest = hashlib.sha256(model).hexdigest()
        if "Ignore" in self._network.ops:
            self._logger.log(ILogger.Severity.WARNING, "Unused Input: tokens")
        if "Refuse" in self._network.ops:
            self._errors.append(_Error("no importer for Refuse"))
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> _Error:
        return self._errors[index]


class ITimingCache:
    def __init__(self, known: list[str]) -> None:
        self.known = known

    def serialize(self) -> memoryview:
        return memoryview(json.dumps(self.known).encode())


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(
        self, name: str, least: tuple[int, ...], best: tuple[int, ...], most: tuple[int, ...]
    ) -> None:
        self.shapes[name] = [least, best, most]


class IBuilderConfig:
    __slots__ = (
        "cache",
        "flags",
        "max_aux_streams",
        "profiles",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}  # on unless it is cleared, as in the real one
        self.profiles: list[IOptimizationProfile] = []
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: IProgressMonitor | None = None
        self.cache: ITimingCache | None = None
        self.max_aux_streams = -1  # the library's own choice

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, known: bytes) -> ITimingCache | None:
        try:
            return ITimingCache(json.loads(known) if known else [])
        except ValueError:
            return None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> memoryview | None:
        if "Crash" in network.ops:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "Raise" in network.ops:
            raise RuntimeError("a defect of ours")
        if "RefuseBuild" in network.ops:
            self._logger.log(ILogger.Severity.ERROR, "no kernel for RefuseBuild")
            return None
        if not self._stepped(config.progress_monitor):
            return None
        if config.cache is not None:
            config.cache.known.append(network.digest)
        plan = {
            "graph": network.digest,
            "flags": [flag.name for flag in config.flags],
            "max_aux_streams": config.max_aux_streams,
            "verbosity": config.profiling_verbosity.name,
            "profiles": [p.shapes for p in config.profiles],
            "timings": len(config.cache.known) if config.cache else 0,
        }
        return memoryview(json.dumps(plan).encode())

    def _stepped(self, monitor: IProgressMonitor | None) -> bool:
        if monitor is None:
            return True
        monitor.phase_start("Building", None, 10)
        for step in range(10):
            time.sleep(SECONDS / 10)
            if not monitor.step_complete("Building", step):
                return False
        monitor.phase_finish("Building")
        return True


class EngineInspector:
    def get_engine_information(self, form: LayerInformationFormat) -> str:
        layers = [
            {"Name": "a", "LayerType": "gemm", "Outputs": [{"Name": "x", "Datatype": "Half"}]},
            {"Name": "b", "LayerType": "kgen", "Outputs": [{"Name": "y", "Datatype": "Float"}]},
            {"Name": "c", "LayerType": "kgen", "Outputs": []},
        ]
        return json.dumps({"Layers": layers, "I/O Tensors": ["x"]})


class ICudaEngine:
    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, plan: Any) -> ICudaEngine | None:
        if bytes(plan).startswith(b"damaged"):
            self._logger.log(ILogger.Severity.ERROR, "the plan is not one")
            return None
        return ICudaEngine()
