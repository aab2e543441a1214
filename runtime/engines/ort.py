"""ONNX Runtime on a CPU: weights mapped from the bundle, buffers bound once, keys and values written in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from twotower.bundle import Bundle, EngineRecord, Progress, engine_folder, inside, read_engine_record
from twotower.errors import EngineMismatchError
from twotower.runtime.engines.base import Array, Binding, Towers
from twotower.runtime.streams import Event, HostStream, Stream
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TowerSignature, signatures

__all__ = ["OrtEngine", "open_ort_cpu"]

TARGET = "ort-cpu"
# Packing weights for the matrix product is faster but copies them into anonymous memory: only where that is small change.
_PACK_BELOW_BYTES = 1 << 30


def open_ort_cpu(bundle: Bundle, *, threads: int = 0, progress: Progress | None = None) -> Towers:
    """Opens the three `ort-cpu` engines of a bundle.

    Raises:
        EngineMismatchError: not built, damaged, or built with another ONNX Runtime or from another graph.
    """
    library = {"name": "onnxruntime", "version": ort.__version__}
    record = read_engine_record(bundle, TARGET, library=library, progress=progress)
    contract = signatures(bundle.config, record.dtype)
    context, head, denoiser = (_open(bundle, record, contract[name], threads) for name in (CONTEXT, CONTEXT_HEAD, DENOISER))
    return Towers(bundle.config, record.dtype, context, head, denoiser)


def _open(bundle: Bundle, record: EngineRecord, signature: TowerSignature, threads: int) -> OrtEngine:
    name = signature.name
    data = inside(bundle.path, record.weights[name])
    if data is None or not data.is_file():
        raise EngineMismatchError(
            f"the weights of the {name} engine are not where build.json says",
            found=f"{record.weights[name]!r}",
            do=f"run `twotower build {bundle.path} --target {TARGET} --force`",
        )
    weights = _mapped(data, record.tables[name])
    return OrtEngine(engine_folder(bundle, TARGET) / f"{name}.onnx", weights, signature, threads=threads)


def _mapped(data: Path, table: Mapping[str, list[Any]]) -> dict[str, Array]:
    """Views of a data file's weights; pages are read when they are first used and can be dropped again by the system."""
    mapped = np.memmap(data, dtype=np.uint8, mode="r")
    out: dict[str, Array] = {}
    for name, (dtype, shape, offset) in table.items():
        count = int(np.prod(shape))
        out[name] = mapped[offset : offset + count * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    return out


class OrtEngine:
    """One optimised graph in an ONNX Runtime session.

    Args:
        graph: The optimised graph.
        weights: Its external weights by name; the engine keeps them alive.
        signature: Its inputs and outputs.
        threads: Threads to compute with, 0 for ONNX Runtime's choice.
    """

    def __init__(self, graph: Path, weights: Mapping[str, Array], signature: TowerSignature, *, threads: int = 0) -> None:
        self.signature = signature
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # done at build time
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if sum(w.nbytes for w in weights.values()) > _PACK_BELOW_BYTES:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self._weights = [ort.OrtValue.ortvalue_from_numpy(w) for w in weights.values()]
        options.add_external_initializers(list(weights), self._weights)
        self._session: ort.InferenceSession | None = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    def bind(self, arrays: Mapping[str, Array]) -> Binding:
        """Binds every input and output to a host buffer; see `TowerEngine.bind`."""
        if self._session is None:
            raise RuntimeError("the engine is closed")
        binding = self._session.io_binding()
        for spec in self.signature.inputs:
            a = arrays[spec.name]
            binding.bind_input(spec.name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        for spec in self.signature.outputs:
            a = arrays[spec.name]
            binding.bind_output(spec.name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        return _OrtBinding(self._session, binding, tuple(arrays.values()))

    def close(self) -> None:
        """Frees the session; idempotent."""
        self._session = None
        self._weights = []


class _OrtBinding:
    """A session with its addresses; `arrays` are held because ONNX Runtime only knows their addresses."""

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding, arrays: tuple[Array, ...]) -> None:
        self._session = session
        self._binding = binding
        self._arrays = arrays

    def run(self, stream: Stream) -> Event:
        """Runs at once: a host stream's earlier work is done when this is called."""
        self._session.run_with_iobinding(self._binding)
        return HostStream.done
