"""ONNX Runtime on a GPU: sessions that work on the towers' streams, bound once to device memory; the library is a value.

The provider enqueues on the stream a session was made for and does not wait at the end of a pass, so that passes are ordered by events
like those of the TensorRT targets. Its own CUDA graphs are not used. **It has never run on a GPU**; all but the provider is tested without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from twotower.bundle import Bundle, EngineFile, Progress, engine_folder, read_engine_record, weight_bytes
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.memory import DeviceBuffer, DeviceMemory
from twotower.runtime.cuda.passes import DevicePass, PassWork, Turns, downloads, uploads
from twotower.runtime.cuda.streams import CudaStream
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.devices import chosen_devices, require_room
from twotower.runtime.engines.towers import Towers
from twotower.runtime.memory import numpy_dtype
from twotower.runtime.placement import place_engines, places_of_tensors
from twotower.runtime.schedule import CHUNK_WIDTHS, row_counts
from twotower.runtime.streams import Streams
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TOKENS, TowerSignature, signatures, state_tensors

__all__ = ["OrtDeviceEngine", "OrtLibrary", "open_ort_cuda"]

TARGET = "ort-cuda"
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
_MOST_ROWS = 1 << 12  # sessions take any number; beyond this a batch is not padded


class OrtLibrary(Protocol):
    """What is needed of ONNX Runtime.

    Attributes:
        version: Its version; engines are tied to it.
        device_type: The kind of memory its bindings are told, `cuda`.
    """

    version: str
    device_type: str

    def session(self, graph: Path, folder: Path, *, device: int, stream: int) -> Any:
        """A session of a graph whose weights are named from `folder`, on a device and on a CUDA stream of it."""
        ...

    def run_options(self) -> Any:
        """Options of a pass that does not wait for its own end."""
        ...


@dataclass(frozen=True, slots=True)
class _Setting:
    """Where and with what an engine works."""

    cuda: Cuda
    library: OrtLibrary
    device: int
    turns: Turns
    copies: StateCopies | None


def open_ort_cuda(
    bundle: Bundle, library: OrtLibrary, cuda: Cuda, *, devices: tuple[int, ...] = (), progress: Progress | None = None
) -> Towers:
    """Opens the three `ort-cuda` engines of a bundle, on one GPU or with a tower on each of two.

    Raises:
        EngineMismatchError: not built, damaged, of another ONNX Runtime or graph, too large, or CUDA cannot be used.
        ConfigError: a device that is not there was asked for.
    """
    record = read_engine_record(bundle, TARGET, library={"name": "onnxruntime", "version": library.version}, progress=progress)
    devices = chosen_devices(cuda, devices)
    contract, state = signatures(bundle.config, record.dtype), state_tensors(bundle.config, record.dtype)
    sizes = {name: [weight_bytes(bundle, record, name)] for name in contract}
    placed = place_engines(sizes, devices)
    needed: dict[int, dict[str, int]] = {}
    for name, (device,) in placed.items():
        needed.setdefault(device, {})[name.replace("_", " ")] = sizes[name][0]
    require_room(cuda, needed, target=TARGET)
    parts = {name: (EngineFile(f"{name}.onnx", (0, len(bundle.config.layers)), s.inputs, s.outputs, ()),) for name, s in contract.items()}
    with Cleanup() as undo:
        memory = DeviceMemory(cuda, devices, places_of_tensors(parts, placed, state))
        undo.callback(memory.close)
        queues = {}
        for name in (CONTEXT, DENOISER):
            queues[name] = CudaStream(cuda, placed[name])
            undo.callback(queues[name].close)
        streams = Streams(queues[CONTEXT], queues[DENOISER])
        turns, engines = {device: Turns() for device in devices}, {}
        for name, signature in contract.items():
            queue, (device,) = queues[DENOISER if name == DENOISER else CONTEXT], placed[name]
            graph = engine_folder(bundle, TARGET) / parts[name][0].file
            session = library.session(graph, bundle.path, device=device, stream=queue.handles[device])
            copies = StateCopies(cuda, state) if name == CONTEXT else None
            engines[name] = OrtDeviceEngine(signature, session, _Setting(cuda, library, device, turns[device], copies))
        undo.pop_all()
    return Towers(
        bundle.config,
        record.dtype,
        engines[CONTEXT],
        engines[CONTEXT_HEAD],
        engines[DENOISER],
        memory=memory,
        streams=streams,
        chunk_widths=CHUNK_WIDTHS,
        row_counts=row_counts(_MOST_ROWS),
    )


class OrtDeviceEngine:
    """One graph in a session that works on a stream of ours.

    Args:
        signature: Its inputs and outputs.
        session: The session, made for the stream its passes will be run on.
        setting: The rest.
    """

    def __init__(self, signature: TowerSignature, session: Any, setting: _Setting) -> None:
        self.signature = signature
        self._session = session
        self._setting = setting

    def bind(self, arrays: Mapping[str, DeviceBuffer]) -> DevicePass:
        """Binds every input and output to its address; see `TowerEngine.bind`."""
        if self._session is None:
            raise RuntimeError("the engine is closed")
        it, session = self._setting, self._session
        binding, options = session.io_binding(), it.library.run_options()
        number = it.device if it.library.device_type == "cuda" else 0
        for specs, bind in ((self.signature.inputs, binding.bind_input), (self.signature.outputs, binding.bind_output)):
            for spec in specs:
                buffer = arrays[spec.name]
                bind(spec.name, it.library.device_type, number, _element_type(spec.dtype), buffer.shape, buffer.addresses[it.device])
        copies = it.copies.of(arrays, {"L": arrays[TOKENS].shape[1]}) if it.copies is not None else None

        def enqueue(queue: CudaStream) -> None:
            it.cuda.use(it.device)
            session.run_with_iobinding(binding, options)
            if copies is not None:
                copies.enqueue(self.signature.outputs, queue)

        work = PassWork(
            name=f"the {self.signature.name} pass",
            devices=(it.device,),
            before=uploads(self.signature, arrays),
            after=downloads(self.signature, arrays),
            enqueue=enqueue,
            capturable=lambda queue: False,
            close=lambda: None,
        )
        return DevicePass(it.cuda, work, [it.turns])

    def close(self) -> None:
        """Frees the session; idempotent."""
        self._session = None


def _element_type(dtype: str) -> Any:
    """What a binding wants to know; NumPy has no bfloat16, so that is given by its ONNX number."""
    return _ONNX_BFLOAT16 if dtype == "bfloat16" else numpy_dtype(dtype).type
