"""What an engine of the fake TensorRT computes: its graph in ONNX Runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from tools.half_precision import round_results

__all__ = ["HostGraph", "view"]

_NUMPY: dict[str, Any] = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "INT64": np.int64,
}


class HostGraph:
    """A graph ready to compute.

    A CPU has no bfloat16: such a graph computes in float32 and rounds every result to bfloat16.
    What it takes and gives has that type.

    Args:
        graph: The serialized model; weights may lie in files
        folder: of this folder.

    Attributes:
        inputs: ONNX's name of each input's type, by input, and likewise
        outputs: of each output's.
        shapes: Axes of each input: numbers, and names for those that vary.
    """

    def __init__(self, graph: bytes, folder: Path) -> None:
        model = onnx.load_from_string(graph)
        weights = {t.name for t in model.graph.initializer}
        values = [v for v in model.graph.input if v.name not in weights]
        self.inputs = {v.name: _type(v) for v in values}
        self.outputs = {v.name: _type(v) for v in model.graph.output}
        self.shapes = {v.name: _axes(v) for v in values}
        half = "BFLOAT16" in (self.inputs | self.outputs).values()
        outside = any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
        # Tests open the same few graphs hundreds of times; files of weights may have changed
        # meanwhile.
        self._session = (_session if outside else _kept_session)(graph, folder, half)

    def check(
        self,
        addresses: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
        within: Callable[[int, int], Any],
    ) -> None:
        """Asks `within(address, bytes)` of every input."""
        for name, kind in self.inputs.items():
            within(addresses[name], int(np.prod(shapes[name])) * np.dtype(_NUMPY[kind]).itemsize)

    def run(self, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Computes from memory to memory.

        Args:
            addresses: Of every input and output.
            shapes: Of every input.
        """
        given = {
            name: _wide(view(addresses[name], shapes[name], _NUMPY[kind]))
            for name, kind in self.inputs.items()
        }
        for (name, kind), value in zip(
            self.outputs.items(),
            self._session.run(None, given),
            strict=True,
        ):
            np.copyto(
                view(addresses[name], value.shape, _NUMPY[kind]),
                value,
                casting="same_kind" if value.dtype != np.float32 else "unsafe",
            )


def _session(graph: bytes, folder: Path, half: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path",
        str(folder),
    )
    if half:
        model = onnx.load_from_string(graph)
        onnx.load_external_data_for_model(model, str(folder))
        round_results(model, "bfloat16")
        # Optimisation would take the roundings away.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph = model.SerializeToString()
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


_kept_session = lru_cache(maxsize=64)(_session)


def view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory at an address as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)


def _type(value: onnx.ValueInfoProto) -> str:
    return onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)


def _axes(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == ml_dtypes.bfloat16 else value
