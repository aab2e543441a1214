"""Opening a bundle's ONNX Runtime engines on GPUs: sessions on the towers' streams.

The library is a value. Its CUDA provider enqueues on the stream a session was made for and does not
wait at the end of a pass, so that passes are ordered by events like those of the TensorRT targets.
Its own CUDA graphs are not used. **It has never run on a GPU**; all but the provider is tested
without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twotower.bundle import (
    Bundle,
    EngineFile,
    EngineRecord,
    ExpertsStep,
    Progress,
    Step,
    engine_folder,
    read_engine_record,
    weight_bytes,
)
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.device import Streams
from twotower.runtime.engines.bundle_weights import check_weights, load_weights, requests_of
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.device_choice import chosen_devices, require_room
from twotower.runtime.engines.experts import OpenExperts
from twotower.runtime.engines.kernel_experts import KernelExperts
from twotower.runtime.engines.ort_engine import OrtDeviceEngine, OrtProgram, OrtRoom
from twotower.runtime.engines.ort_library import OrtLibrary
from twotower.runtime.engines.shared_buffers import furnish
from twotower.runtime.engines.step_runs import code_places
from twotower.runtime.engines.towers import Towers
from twotower.runtime.placement import place_engines, places_of_tensors
from twotower.runtime.schedule import CHUNK_WIDTHS, row_counts
from twotower.runtime.weights.store import WeightStore
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, MAX_CHUNK, signatures, state_tensors

__all__ = ["OrtDeviceOptions", "open_ort_cuda"]

TARGET = "ort-cuda"
_MOST_ROWS = 1 << 12  # sessions take any number; beyond this a batch is not padded


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtDeviceOptions:
    """Options of opening.

    Attributes:
        devices: GPUs by number; empty for the first.
        progress: Called with (bytes hashed, bytes to hash) while engine files are checked.
        loading: Called with (bytes loaded, bytes to load) while weights of experts between programs
            go to a device.
        experts: Opens what computes experts between programs.
    """

    devices: tuple[int, ...] = ()
    progress: Progress | None = None
    loading: Progress | None = None
    experts: OpenExperts = KernelExperts


def open_ort_cuda(
    bundle: Bundle,
    library: OrtLibrary,
    cuda: Cuda,
    options: OrtDeviceOptions | None = None,
) -> Towers:
    """Opens the three `ort-cuda` graphs of a bundle, on one GPU or spread over several.

    Raises:
        EngineMismatchError: not built, damaged, of another ONNX Runtime or graph, too large, or
            CUDA cannot be used.
        ConfigError: a device that is not there was asked for.
    """
    how = options or OrtDeviceOptions()
    record = read_engine_record(
        bundle,
        TARGET,
        library={"name": "onnxruntime", "version": library.version},
        progress=how.progress,
    )
    devices = chosen_devices(cuda, how.devices)
    steps = record.steps or _whole_graphs(bundle, record)
    sizes = {name: _sizes(bundle, record, name) for name in steps}
    placed = place_engines(sizes, devices)
    needed: dict[int, dict[str, int]] = {}
    for name, places in placed.items():
        for size, device in zip(sizes[name], places, strict=True):
            parts = needed.setdefault(device, {})
            parts[name.replace("_", " ")] = parts.get(name.replace("_", " "), 0) + size
    require_room(cuda, needed, target=TARGET)
    if record.steps:
        check_weights(record, {name: bundle.weights(name) for name in record.steps}, bundle)
    with Cleanup() as undo:
        weights = WeightStore(cuda)
        undo.callback(weights.close)
        load_weights(weights, bundle, requests_of(bundle, record, placed), progress=how.loading)
        opening = _Opening(cuda, library, devices, steps, placed, weights, how, undo)
        towers = _opened(bundle, record, opening)
        undo.pop_all()
    return towers


@dataclass(frozen=True, slots=True)
class _Opening:
    """What opening works with; `undo` closes what was made so far if the rest fails."""

    cuda: Cuda
    library: OrtLibrary
    devices: tuple[int, ...]
    steps: Mapping[str, Sequence[Step]]
    placed: Mapping[str, Sequence[int]]
    weights: WeightStore
    options: OrtDeviceOptions
    undo: Cleanup


def _opened(bundle: Bundle, record: EngineRecord, with_: _Opening) -> Towers:
    cuda, placed, limits = with_.cuda, with_.placed, record.limits
    contract, state = (
        signatures(bundle.config, record.dtype),
        state_tensors(bundle.config, record.dtype),
    )
    engines: dict[str, list[EngineFile]] = {}
    for name, steps in with_.steps.items():
        engines[name] = [step for step in steps if isinstance(step, EngineFile)]
    memory = DeviceMemory(cuda, with_.devices, places_of_tensors(engines, placed, state))
    with_.undo.callback(memory.close)
    queues: dict[str, CudaStream] = {}
    for name in (CONTEXT, DENOISER):
        queues[name] = CudaStream(cuda, placed[name])
        with_.undo.callback(queues[name].close)
    room = OrtRoom(cuda, with_.library, memory, with_.weights)
    code: list[tuple[str, int]] = []
    for name, steps in with_.steps.items():
        code += code_places(steps, placed[name])
    owned = [with_.weights.close]
    if code:
        assert limits is not None, "engines with experts between have limits"
        room.experts = with_.options.experts(engine_folder(bundle, TARGET), cuda, code)
        owned.insert(0, room.experts.close)
        with_.undo.callback(room.experts.close)
        most = {"B": limits.max_batch, "L": MAX_CHUNK, "S": bundle.trained_block_size}
        none = dict.fromkeys((device for _, device in code), 0)  # sessions bring their own
        furnish(room, with_.steps, scratch=none, sizes=most)
    made = {}
    for name, signature in contract.items():
        queue = queues[DENOISER if name == DENOISER else CONTEXT]
        places = placed[name]
        opened = _sessions(bundle, with_.steps[name], places, library=with_.library, queue=queue)
        copies = StateCopies(cuda, state) if name == CONTEXT else None
        data = bundle.data_file(name)
        made[name] = OrtDeviceEngine(signature, opened, room, data=data, copies=copies)
    return Towers(
        bundle.config,
        record.dtype,
        made[CONTEXT],
        made[CONTEXT_HEAD],
        made[DENOISER],
        memory=memory,
        streams=Streams(queues[CONTEXT], queues[DENOISER]),
        limits=limits,
        chunk_widths=CHUNK_WIDTHS,
        row_counts=row_counts(_MOST_ROWS if limits is None else limits.max_batch),
        fixed_block=bundle.trained_block_size if limits is not None else None,
        owned=tuple(owned),
    )


def _whole_graphs(bundle: Bundle, record: EngineRecord) -> dict[str, tuple[Step, ...]]:
    """Each graph as its only step."""
    layers = (0, len(bundle.config.layers))
    contract = signatures(bundle.config, record.dtype)
    out: dict[str, tuple[Step, ...]] = {}
    for name, graph in contract.items():
        out[name] = (EngineFile(f"{name}.onnx", layers, graph.inputs, graph.outputs, ()),)
    return out


def _sizes(bundle: Bundle, record: EngineRecord, name: str) -> list[int]:
    """Bytes of the weights of each session of a graph, and of the experts after it."""
    if not record.steps:
        return [weight_bytes(bundle, record, name)]
    table, out = bundle.weights(name), list[int]()
    for step in record.steps[name]:
        if isinstance(step, EngineFile):
            out.append(sum(table[weight].nbytes for weight in step.constants))
        else:
            out[-1] += sum(table[w.name].nbytes for w in step.weights.values())
    return out


def _sessions(
    bundle: Bundle,
    steps: Sequence[Step],
    devices: Sequence[int],
    *,
    library: OrtLibrary,
    queue: CudaStream,
) -> list[OrtProgram | ExpertsStep]:
    """The steps of a graph with a session for every program."""
    out: list[OrtProgram | ExpertsStep] = []
    places, folder = iter(devices), engine_folder(bundle, TARGET)
    for step in steps:
        if isinstance(step, EngineFile):
            device = next(places)
            file, stream = folder / step.file, queue.handles[device]
            session = library.session(file, bundle.path, device=device, stream=stream)
            out.append(OrtProgram(step, device, session))
        else:
            out.append(step)
    return out
