"""Opening a bundle's TensorRT engines: checked, placed on devices, loaded once, with one scratch memory a device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from twotower.bundle import (
    Bundle,
    EngineFile,
    EngineRecord,
    ExpertsStep,
    Progress,
    engine_folder,
    read_engine_record,
)
from twotower.dtypes import carried_dtype
from twotower.errors import EngineMismatchError
from twotower.hardware import Gpu, untried
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.device import Streams
from twotower.runtime.engines.bundle_weights import (
    check_weights,
    load_weights,
    reads_of,
    requests_of,
)
from twotower.runtime.engines.copies import StateCopies
from twotower.runtime.engines.device_choice import chosen_devices, require_room
from twotower.runtime.engines.experts import OpenExperts
from twotower.runtime.engines.kernel_experts import KernelExperts
from twotower.runtime.engines.shared_buffers import furnish
from twotower.runtime.engines.step_runs import code_places
from twotower.runtime.engines.tensorrt_engine import EngineRoom, TensorRTEngine
from twotower.runtime.engines.tensorrt_plan import Plan, PlanLoader
from twotower.runtime.engines.towers import Towers
from twotower.runtime.placement import place_engines, places_of_tensors
from twotower.runtime.schedule import CHUNK_WIDTHS, row_counts
from twotower.runtime.weights.store import WeightStore
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, MAX_CHUNK, signatures, state_tensors
from twotower.tensorrt_library import Flavour
from twotower.weights.refs import WeightRef

__all__ = ["TensorRTOptions", "load_steps", "open_tensorrt"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTOptions:
    """Options of opening.

    Attributes:
        devices: GPUs by number; empty for the first.
        graphs: Whether passes are captured as CUDA graphs.
        gpus: What the GPUs are, by number.
        any_sm: `TWOTOWER_RTX_ANY_SM`: engines are opened on GPUs they hold no code for.
        progress: Called with (bytes hashed, bytes to hash) while engine files are checked.
        loading: Called with (bytes loaded, bytes to load) while weights go to a device.
        experts: Opens what computes experts between programs.
    """

    devices: tuple[int, ...] = ()
    graphs: bool = True
    gpus: tuple[Gpu, ...] = ()
    any_sm: str = ""
    progress: Progress | None = None
    loading: Progress | None = None
    experts: OpenExperts = KernelExperts


def open_tensorrt(bundle: Bundle, flavour: Flavour, cuda: Cuda, options: TensorRTOptions) -> Towers:
    """Opens the three graphs of a bundle on TensorRT.

    Raises:
        EngineMismatchError: not built, damaged, of another library, graph or GPU, too large for the
            GPU, or there is none.
        ConfigError: a device that is not there was asked for.
    """
    record = read_engine_record(
        bundle, flavour.target, library=flavour.library, progress=options.progress
    )
    devices = chosen_devices(cuda, options.devices)
    _check_sms(
        record,
        [options.gpus[d] for d in devices if d < len(options.gpus)],
        bundle,
        any_sm=options.any_sm,
    )
    tables = {name: bundle.weights(name) for name in record.engines}
    check_weights(record, tables, bundle)
    sizes = {name: _sizes(record, name, tables[name]) for name in record.engines}
    placed = place_engines(sizes, devices)
    require_room(cuda, _needed(bundle, record, sizes, placed), target=flavour.target)
    with Cleanup() as undo:
        weights = WeightStore(cuda)
        undo.callback(weights.close)
        load_weights(weights, bundle, requests_of(bundle, record, placed), progress=options.loading)
        towers = _opened(
            bundle, record, placed, _Opening(flavour, cuda, devices, weights, undo, options)
        )
        undo.pop_all()
    return towers


@dataclass(frozen=True, slots=True)
class _Opening:
    """What opening works with; `undo` closes what was made so far if the rest fails."""

    flavour: Flavour
    cuda: Cuda
    devices: tuple[int, ...]
    weights: WeightStore
    undo: Cleanup
    options: TensorRTOptions


def _opened(
    bundle: Bundle, record: EngineRecord, placed: Mapping[str, Sequence[int]], with_: _Opening
) -> Towers:
    cuda, limits = with_.cuda, record.limits
    assert limits is not None, "TensorRT engines have limits"
    state = state_tensors(bundle.config, record.dtype)
    memory = DeviceMemory(cuda, with_.devices, places_of_tensors(record.engines, placed, state))
    with_.undo.callback(memory.close)
    queues: dict[str, CudaStream] = {}
    for name in (CONTEXT, DENOISER):
        queues[name] = CudaStream(cuda, placed[name])
        with_.undo.callback(queues[name].close)
    in_place = {t.present.name: t.past.name for t in state if t.in_place}
    sms = {number: gpu.sm for number, gpu in enumerate(with_.options.gpus)}
    loader = PlanLoader(with_.flavour, in_place, sms)
    rows = row_counts(limits.max_batch)
    room = EngineRoom(cuda, loader, memory, with_.weights, with_.options.graphs, rows=rows)
    folder = engine_folder(bundle, record.target)
    code = [
        place for name in record.steps for place in code_places(record.steps[name], placed[name])
    ]
    room.experts = with_.options.experts(folder, cuda, code) if code else None
    experts = () if room.experts is None else (room.experts.close,)
    for close in experts:
        with_.undo.callback(close)
    steps = {
        name: load_steps(record, name, placed[name], loader=loader, folder=folder, cuda=cuda)
        for name in record.steps
    }
    plans = [step for some in steps.values() for step in some if isinstance(step, Plan)]
    scratch = {
        plan.device: max(other.scratch for other in plans if other.device == plan.device)
        for plan in plans
    }
    furnish(room, record.steps, scratch=scratch, sizes={"B": limits.max_batch, "L": MAX_CHUNK})
    fixed = {"T": limits.capacity, "S": bundle.trained_block_size}
    contract = {
        name: graph.with_sizes(fixed)
        for name, graph in signatures(bundle.config, record.dtype).items()
    }
    engines = {
        name: TensorRTEngine(
            contract[name],
            steps[name],
            room,
            data=bundle.data_file(name),
            copies=StateCopies(cuda, state) if name == CONTEXT else None,
        )
        for name in contract
    }
    return Towers(
        bundle.config,
        record.dtype,
        engines[CONTEXT],
        engines[CONTEXT_HEAD],
        engines[DENOISER],
        memory=memory,
        streams=Streams(queues[CONTEXT], queues[DENOISER]),
        limits=limits,
        chunk_widths=CHUNK_WIDTHS,
        row_counts=rows,
        compiles=with_.flavour.runtime_cache,
        keep=room.keep_kernels,
        fixed_block=bundle.trained_block_size,
        owned=(*experts, with_.weights.close),
    )


def _sizes(record: EngineRecord, name: str, table: Mapping[str, WeightRef]) -> list[int]:
    """Bytes of each engine of a graph with what it and the experts after it read; a file of equal programs counts once."""
    out, known = [], set()
    for part, reads in zip(record.engines[name], reads_of(record.steps[name]), strict=True):
        file = 0 if part.file in known else record.files[part.file].size
        known.add(part.file)
        out.append(file + sum(table[w.name].nbytes for w in reads))
    return out


def _needed(
    bundle: Bundle,
    record: EngineRecord,
    sizes: Mapping[str, Sequence[int]],
    placed: Mapping[str, Sequence[int]],
) -> dict[int, dict[str, int]]:
    """Bytes each device must have free: its engines, and the state of one row. Scratch is known only once engines are loaded."""
    assert record.limits is not None
    state = state_tensors(bundle.config, record.dtype)
    places = places_of_tensors(record.engines, placed, state)
    one = {"B": 1, "T": record.limits.capacity}
    needed: dict[int, dict[str, int]] = {}
    for name, devices in placed.items():
        for size, device in zip(sizes[name], devices, strict=True):
            parts = needed.setdefault(device, {})
            parts[name.replace("_", " ")] = parts.get(name.replace("_", " "), 0) + size
    for tensor in state:
        size = (
            prod(tensor.past.shape(one))
            * carried_dtype(tensor.past.dtype).itemsize
            * (1 if tensor.in_place else 2)
        )
        for device in places[tensor.past.name]:
            needed[device]["state of a row"] = needed[device].get("state of a row", 0) + size
    return needed


def _check_sms(record: EngineRecord, gpus: Sequence[Gpu], bundle: Bundle, *, any_sm: str) -> None:
    assert record.limits is not None
    sms = record.limits.sms
    foreign = [gpu for gpu in gpus if sms and gpu.sm not in sms]
    if any_sm and record.target == "rtx":
        built = (
            f"built for SM {', '.join(map(str, sms))}" if sms else "built for the library's own set"
        )
        logger.warning("%s; the engines are %s", untried(any_sm, [gpu.sm for gpu in gpus]), built)
    elif foreign:
        built = ", ".join(map(str, record.limits.sms))
        wanted = ",".join(map(str, sorted({*record.limits.sms, foreign[0].sm})))
        rebuild = f"`twotower build {bundle.path} --target {record.target}"
        raise EngineMismatchError(
            f"the {record.target} engines of '{bundle.path}' hold no code for {foreign[0].name}",
            found=f"it is SM {foreign[0].sm}; they were built for SM {built}",
            do=f"{rebuild} --sm {wanted}`"
            if record.target == "rtx"
            else f"{rebuild}` on this machine",
        )


def load_steps(
    record: EngineRecord,
    name: str,
    devices: Sequence[int],
    *,
    loader: PlanLoader,
    folder: Path,
    cuda: Cuda,
) -> list[Plan | ExpertsStep]:
    """The steps of a graph with every engine on its device, each file once a device."""
    out: list[Plan | ExpertsStep] = []
    known: dict[tuple[str, int], Plan] = {}
    places = iter(devices)
    for step in record.steps[name]:
        if not isinstance(step, EngineFile):
            out.append(step)
            continue
        device, file = next(places), folder / step.file
        cuda.use(device)
        if (step.file, device) in known:
            out.append(loader.another(known[step.file, device], step, file))
            continue
        before = cuda.free_memory()[0]
        plan = loader.load(file, step, device)
        taken, size = before - cuda.free_memory()[0], record.files[step.file].size
        logger.info("%s, %d bytes, took %d bytes of GPU %d", step.file, size, taken, device)
        known[step.file, device] = plan
        out.append(plan)
    return out
