"""ONNX Runtime: engines on a CPU, with weights mapped from the bundle, and sessions on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twotower.bundle import (
    Bundle,
    EngineRecord,
    Progress,
    engine_folder,
    read_engine_record,
    weight_bytes,
)
from twotower.errors import EngineMismatchError
from twotower.onnx_runtime import ort, session_options
from twotower.processors import usable_cores, usable_memory
from twotower.product_probe import EVEN_ROWS, PROBE_FILE, rows_are_alike
from twotower.runtime.device import Array, Event, HostStream, Stream
from twotower.runtime.engines.tower_engine import Binding
from twotower.runtime.engines.towers import Towers
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TowerSignature, signatures
from twotower.units import format_bytes

CPU, CUDA = "ort-cpu", "ort-cuda"
Copies = Sequence[tuple[Array, Array]]
_ONE_THREAD_BELOW_BYTES = (
    32 << 20
)  # operators of so small a graph are done before a second thread has woken up


def open_ort_cpu(bundle: Bundle, *, threads: int = 0, progress: Progress | None = None) -> Towers:
    """Opens the three `ort-cpu` engines of a bundle.

    Raises:
        EngineMismatchError: not built, damaged, or built with another ONNX Runtime or from another
            graph.
    """
    library = {"name": "onnxruntime", "version": ort.__version__}
    record = read_engine_record(bundle, CPU, library=library, progress=progress)
    _require_memory(bundle, record)
    _require_rows_alike(bundle, record)
    contract = signatures(bundle.config, record.dtype)
    context, head, denoiser = (
        _open(bundle, record, contract[name], threads) for name in (CONTEXT, CONTEXT_HEAD, DENOISER)
    )
    return Towers(bundle.config, record.dtype, context, head, denoiser)


def _require_memory(bundle: Bundle, record: EngineRecord) -> None:
    """Refuses engines that copy packed experts into more memory than this machine has."""
    memory = usable_memory()
    needed = sum(weight_bytes(bundle, record, name) for name in (CONTEXT, CONTEXT_HEAD, DENOISER))
    if record.report.get("form", {}).get("experts") == "packed" and memory and needed > memory:
        raise EngineMismatchError(
            f"the {CPU} engine of '{bundle.path}' copies its experts into memory, and there is too "
            "little here",
            found=f"{format_bytes(needed)} of weights, {format_bytes(memory)} of memory this "
            "process may use",
            do="build it here, where it reads them from the file: "
            f"`twotower build BUNDLE --target {CPU}`",
        )


def _require_rows_alike(bundle: Bundle, record: EngineRecord) -> None:
    """Asks this processor, as the build asked its own, whether it computes rows alike."""
    probe = engine_folder(bundle, CPU) / PROBE_FILE
    if PROBE_FILE in record.files and not rows_are_alike(probe.read_bytes()):
        raise EngineMismatchError(
            f"the {CPU} engine of '{bundle.path}' was built on another kind of processor",
            found="here a row's text would depend on the rows beside it: quantized products "
            "compute one row otherwise than several",
            do=f"build it here: `twotower build BUNDLE --target {CPU} --force`",
        )


def _open(
    bundle: Bundle, record: EngineRecord, signature: TowerSignature, threads: int
) -> OrtEngine:
    name = signature.name
    size = weight_bytes(bundle, record, name)
    graph = engine_folder(bundle, CPU) / f"{name}.onnx"
    return OrtEngine(
        graph, bundle.path, signature, pack=True, threads=threads or engine_threads(size)
    )


def engine_threads(weight_bytes: int) -> int:
    """Threads of an engine: one for few bytes of weights, else one a core it may use."""
    return 1 if weight_bytes < _ONE_THREAD_BELOW_BYTES else usable_cores()


class OrtEngine:
    """One optimised graph in an ONNX Runtime session.

    Args:
        folder: The folder its weight file is named from. ONNX Runtime maps that file: pages are
            read when they are first used, and the system can drop them again.
        pack: Pack matrices for the product, which is faster but copies them into anonymous memory;
            stacks of matrices, such as those of large experts, never are.
        threads: Threads to compute with, 0 for one a core that this process may use.
    """

    def __init__(
        self, graph: Path, folder: Path, signature: TowerSignature, *, pack: bool, threads: int = 0
    ) -> None:
        self.signature = signature
        options = session_options(folder, threads=threads)
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )  # done at build time
        if not pack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self._session: ort.InferenceSession | None = _load(
            graph, options, ["CPUExecutionProvider"], CPU
        )
        self._even_rows = EVEN_ROWS in self._session.get_modelmeta().custom_metadata_map

    def bind(self, arrays: Mapping[str, Array]) -> Binding:
        """Binds every input and output to a host buffer; see `TowerEngine.bind`."""
        if self._even_rows and arrays[self.signature.inputs[0].name].size % 2:
            return self._bound_with_one_more(arrays)
        session, binding = self._bound(arrays)
        return _OrtBinding(session, binding, tuple(arrays.values()))

    def _bound_with_one_more(self, arrays: Mapping[str, Array]) -> Binding:
        """A pass of an odd number of positions, with its first row twice and copies."""
        names = [spec.name for spec in self.signature.inputs]
        copies = {name: np.empty((len(a) + 1, *a.shape[1:]), a.dtype) for name, a in arrays.items()}
        session, binding = self._bound(copies)
        given = [(arrays[name], copies[name]) for name in names]
        wanted = [(arrays[spec.name], copies[spec.name]) for spec in self.signature.outputs]
        return _OneMoreBinding(
            _OrtBinding(session, binding, tuple(copies.values())),
            given,
            wanted,
        )

    def _bound(self, arrays: Mapping[str, Array]) -> tuple[ort.InferenceSession, ort.IOBinding]:
        if self._session is None:
            raise RuntimeError("the engine is closed")
        binding = self._session.io_binding()
        for spec in self.signature.inputs:
            a = arrays[spec.name]
            binding.bind_input(
                spec.name,
                "cpu",
                0,
                a.dtype.type,
                a.shape,
                a.ctypes.data,
            )
        for spec in self.signature.outputs:
            a = arrays[spec.name]
            binding.bind_output(
                spec.name,
                "cpu",
                0,
                a.dtype.type,
                a.shape,
                a.ctypes.data,
            )
        return self._session, binding

    def close(self) -> None:
        """Frees the session; idempotent."""
        self._session = None


def _load(
    graph: Path, options: ort.SessionOptions, providers: list[Any], target: str
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(graph.read_bytes(), options, providers=providers)
    except (
        Exception
    ) as e:  # ONNX Runtime raises a class of its own for every kind of failure, with no common base
        raise EngineMismatchError(
            f"ONNX Runtime cannot load {graph}",
            found=" ".join(str(e).split()),
            do=f"build it again with `twotower build BUNDLE --target {target} --force`; if it "
            "fails again, check free memory",
        ) from e


class _OrtBinding:
    """A session with its addresses; `arrays` are held because the session only knows addresses."""

    def __init__(
        self, session: ort.InferenceSession, binding: ort.IOBinding, arrays: tuple[Array, ...]
    ) -> None:
        self._session = session
        self._binding = binding
        self._arrays = arrays

    def run(self, stream: Stream) -> Event:
        """Runs at once: a host stream's earlier work is done when this is called."""
        self._session.run_with_iobinding(self._binding)
        return HostStream.done

    def close(self) -> None:
        """Nothing was made that is not let go with the object."""


class _OneMoreBinding:
    """A pass on copies with the first row doubled; results of the others are copied back."""

    def __init__(self, inner: Binding, given: Copies, wanted: Copies) -> None:
        self._inner, self._given, self._wanted = inner, given, wanted

    def run(self, stream: Stream) -> Event:
        for array, copy in self._given:
            copy[0], copy[1:] = array[0], array
        done = self._inner.run(stream)
        for array, copy in self._wanted:
            array[...] = copy[1:]
        return done

    def close(self) -> None:
        self._inner.close()


class CudaLibrary:
    """ONNX Runtime with its CUDA provider, for `open_ort_cuda`; it has never run on a GPU."""

    version = str(ort.__version__)
    device_type = "cuda"

    def session(
        self, graph: Path, folder: Path, *, device: int, stream: int
    ) -> ort.InferenceSession:
        """A session on our CUDA stream; EngineMismatchError if it cannot be loaded."""
        options = session_options(folder)
        provider = {
            "device_id": str(device),
            "user_compute_stream": str(stream),
            "use_tf32": "0",  # float32 means float32, as for the other targets
            # the state is not in the arena; doubling would take memory from it
            "arena_extend_strategy": "kSameAsRequested",
        }
        session = _load(
            graph, options, [("CUDAExecutionProvider", provider), "CPUExecutionProvider"], CUDA
        )
        if (
            "CUDAExecutionProvider" not in session.get_providers()
        ):  # the library goes on without one that fails to load, on the CPU
            raise EngineMismatchError(
                "ONNX Runtime cannot use CUDA here",
                found=f"providers: {', '.join(session.get_providers())}; the CUDA libraries it "
                "needs did not load",
                do="install the libraries your onnxruntime-gpu asks for (CUDA 13, cuDNN 9), or use "
                "`--target ort-cpu`",
            )
        return session

    def run_options(self) -> ort.RunOptions:
        """Options of a pass that does not wait for its own end: events say when it is done."""
        options = ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options
