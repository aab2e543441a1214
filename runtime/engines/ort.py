"""ONNX Runtime on a CPU: weights mapped from the bundle, buffers bound once, keys and values written in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from twotower.bundle import Bundle, EngineRecord, Progress, engine_folder, inside, read_engine_record
from twotower.errors import EngineMismatchError
from twotower.runtime.engines.base import Binding
from twotower.runtime.engines.towers import Towers
from twotower.runtime.memory import Array
from twotower.runtime.streams import Event, HostStream, Stream
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TowerSignature, signatures

__all__ = ["OrtEngine", "open_ort_cpu"]

TARGET = "ort-cpu"
_PACK_BELOW_BYTES = 1 << 30  # packing copies: only where that is small change
_ONE_THREAD_BELOW_BYTES = 32 << 20  # operators of so small a graph are done before a second thread has woken up


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
    graph, size = engine_folder(bundle, TARGET) / f"{name}.onnx", data.stat().st_size
    threads = threads or (1 if size < _ONE_THREAD_BELOW_BYTES else 0)
    return OrtEngine(graph, bundle.path, signature, pack=size < _PACK_BELOW_BYTES, threads=threads)


class OrtEngine:
    """One optimised graph in an ONNX Runtime session.

    Args:
        graph: The optimised graph.
        folder: The folder its weight file is named from. ONNX Runtime maps that file: pages are read when they are first used, and
            the system can drop them again.
        signature: Its inputs and outputs.
        pack: Pack weights for the matrix product, which is faster but copies them into anonymous memory.
        threads: Threads to compute with, 0 for ONNX Runtime's choice.
    """

    def __init__(self, graph: Path, folder: Path, signature: TowerSignature, *, pack: bool, threads: int = 0) -> None:
        self.signature = signature
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # done at build time
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if not pack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        # Weights may lie outside the graph's own folder only for a graph that is passed as bytes.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
        self._session: ort.InferenceSession | None = _load(graph, options)

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


def _load(graph: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime raises a class of its own for every kind of failure, with no common base
        raise EngineMismatchError(
            f"ONNX Runtime cannot load {graph}",
            found=" ".join(str(e).split()),
            do=f"build it again with `twotower build BUNDLE --target {TARGET} --force`; if it fails again, check free memory",
        ) from e


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

    def close(self) -> None:
        """Nothing was made that is not let go with the object."""
