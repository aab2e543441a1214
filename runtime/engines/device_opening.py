"""Opening a bundle on GPUs without regard to the library: placement, weights, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineFile,
    EngineRecord,
    FileRecord,
    Progress,
    Step,
    engine_folder,
    remember_files,
    unverified_files,
)
from twotower.errors import ConfigError, EngineMismatchError
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.device import Streams
from twotower.runtime.engines.kernel_experts import KernelExperts
from twotower.runtime.engines.pass_steps import StateCopies
from twotower.runtime.engines.shared_resources import SharedResources, code_places
from twotower.runtime.engines.tower_engine import TowerEngine
from twotower.runtime.engines.towers import Towers
from twotower.runtime.placement import place_engines, places_of_tensors
from twotower.runtime.schedule import CHUNK_WIDTHS
from twotower.runtime.weights.store import LoadRequest, WeightStore
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, StateTensor, TensorSpec, state_tensors
from twotower.units import format_bytes


@dataclass(frozen=True)
class DeviceOpening:
    """A bundle whose engines have been given devices.

    Attributes:
        sizes: Bytes of each engine of a graph, with the weights that it and the experts after it
            read.
    """

    bundle: Bundle
    record: EngineRecord
    cuda: Cuda
    devices: tuple[int, ...]
    steps: Mapping[str, Sequence[Step]]
    sizes: Mapping[str, Sequence[int]]

    @cached_property
    def placed(self) -> dict[str, tuple[int, ...]]:
        """A device for every engine of every graph."""
        return place_engines(self.sizes, self.devices)

    @cached_property
    def state(self) -> tuple[StateTensor, ...]:
        """The tensors of the state."""
        return tuple(state_tensors(self.bundle.config, self.record.dtype))

    @cached_property
    def places(self) -> dict[str, tuple[int, ...]]:
        """The devices that each tensor is needed on."""
        engines: dict[str, list[EngineFile]] = {}
        for name, steps in self.steps.items():
            engines[name] = [step for step in steps if isinstance(step, EngineFile)]
        return places_of_tensors(engines, self.placed, self.state)

    def require_room(self, state_of_a_row: Mapping[str, int] | None = None) -> None:
        """Checks device memory before loading; scratch memory is known only afterwards.

        `state_of_a_row` gives the bytes of each state tensor for one row, where known. Raises
        EngineMismatchError if a device has less memory free than is needed.
        """
        needed: dict[int, dict[str, int]] = {}
        for name, devices in self.placed.items():
            what = name.replace("_", " ")
            for size, device in zip(self.sizes[name], devices, strict=True):
                parts = needed.setdefault(device, {})
                parts[what] = parts.get(what, 0) + size
        for name, size in (state_of_a_row or {}).items():
            for device in self.places[name]:
                parts = needed[device]
                parts["state of a row"] = parts.get("state of a row", 0) + size
        for device, parts in needed.items():
            self.cuda.use(device)
            free, total = self.cuda.free_memory()
            asked = sum(parts.values())
            if asked > free:
                listed = ", ".join(f"{what} {format_bytes(n)}" for what, n in parts.items() if n)
                raise EngineMismatchError(
                    f"the {self.record.target} engines do not fit on GPU {device}",
                    found=f"{format_bytes(asked)} needed ({listed}), "
                    f"{format_bytes(free)} of {format_bytes(total)} free",
                    do="spread the towers with --devices 0,1, build with a smaller --max-context "
                    "or another dtype, or end other programs; `twotower plan BUNDLE` lists what "
                    "would fit",
                )

    def shared(self, undo: Cleanup, progress: Progress | None) -> SharedResources:
        """Weights and kernels of experts on their devices, and memory for the rest.

        Raises:
            BundleError: a file is not what the bundle says.
            EngineMismatchError: a device has not so much memory, or kernels do not fit it.
        """
        weights = WeightStore(self.cuda)
        undo.callback(weights.close)
        requests = requests_of(self.bundle, self.record, self.placed)
        _load_weights(weights, self.bundle, requests, progress)
        memory = DeviceMemory(self.cuda, self.devices, self.places)
        undo.callback(memory.close)
        shared = SharedResources(self.cuda, memory, weights)
        code: list[tuple[str, int]] = []
        for name, steps in self.steps.items():
            code += code_places(steps, self.placed[name])
        if code:
            folder = engine_folder(self.bundle, self.record.target)
            shared.experts = KernelExperts(folder, self.cuda, code)
            undo.callback(shared.experts.close)
        return shared

    def queues(self, undo: Cleanup) -> dict[str, CudaStream]:
        """The stream of each graph; the context head runs on the context tower's."""
        queues: dict[str, CudaStream] = {}
        for name in (CONTEXT, DENOISER):
            queues[name] = CudaStream(self.cuda, self.placed[name])
            undo.callback(queues[name].close)
        return {**queues, CONTEXT_HEAD: queues[CONTEXT]}

    def copies(self, name: str) -> StateCopies | None:
        """What copies the state that a graph writes to other devices."""
        if name != CONTEXT:
            return None
        return StateCopies(self.cuda, self.state)

    def towers(
        self,
        engines: Mapping[str, TowerEngine],
        shared: SharedResources,
        queues: Mapping[str, CudaStream],
        **options: Any,
    ) -> Towers:
        """The opened engines; `options` are further fields of `Towers`."""
        experts = () if shared.experts is None else (shared.experts.close,)
        return Towers(
            self.bundle.config,
            self.record.dtype,
            engines[CONTEXT],
            engines[CONTEXT_HEAD],
            engines[DENOISER],
            memory=shared.memory,
            streams=Streams(queues[CONTEXT], queues[DENOISER]),
            limits=self.record.limits,
            chunk_widths=CHUNK_WIDTHS,
            owned=(*experts, shared.weights.close),
            **options,
        )


def chosen_devices(cuda: Cuda, asked: Sequence[int]) -> tuple[int, ...]:
    """The GPUs asked for, or the first.

    Raises:
        ConfigError: one of them is not there, or is named twice.
    """
    count = cuda.device_count()
    wrong = [d for d in asked if not 0 <= d < count]
    if wrong or len(set(asked)) < len(asked):
        what = f"a GPU is named twice in {','.join(map(str, asked))}"
        if wrong:
            what = f"there is no GPU {wrong[0]}"
        numbers = "0" if count == 1 else f"0 to {count - 1}"
        raise ConfigError(
            what,
            found=f"GPUs here: {numbers}",
            do="choose others with --devices; CUDA_VISIBLE_DEVICES hides some",
        )
    devices = tuple(asked) or (0,)
    for device in devices:
        cuda.use(device)
        for other in devices:
            if other != device:
                cuda.enable_peer(other)
    return devices


def check_weights(record: EngineRecord, bundle: Bundle) -> None:
    """Refuses engines that were built for other weights than the bundle holds.

    Raises:
        EngineMismatchError: a weight is missing, of another shape or type, or neither an input nor
            inside.
        BundleError: the bundle holds no weights.
    """
    bundle.require_weights("running engines")
    problems: list[str] = []
    for name, parts in record.engines.items():
        table, inside = bundle.weights(name), {n for part in parts for n in part.constants}
        experts = [w for step in record.experts[name] for w in step.weights.values()]
        for spec in (*(w for part in parts for w in part.weights), *experts):
            has = table.get(spec.name)
            if has is None:
                problems.append(f"{spec.name} is not in the bundle")
            elif (has.dtype, has.shape) != (spec.dtype, spec.axes):
                wants = f"{spec.dtype} {list(spec.axes)}"
                problems.append(f"{spec.name} is {has.dtype} {list(has.shape)}, expected {wants}")
            inside.add(spec.name)
        problems += [f"{n} is neither an input nor inside" for n in table if n not in inside]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise EngineMismatchError(
            f"the {record.target} engines do not fit the weights of bundle '{bundle.path}'",
            found="; ".join(problems[:5]) + more,
            do=f"`twotower build {bundle.path} --target {record.target} --force`",
        )


def requests_of(
    bundle: Bundle, record: EngineRecord, placed: Mapping[str, Sequence[int]]
) -> list[LoadRequest]:
    """Weights that each device needs: of the engines placed on it and the experts after them."""
    out = []
    for name, steps in record.steps.items():
        table, path = bundle.weights(name), bundle.data_file(name)
        file = bundle.files[GRAPH_FILES[name] + DATA_SUFFIX]
        for device, reads in zip(placed[name], reads_of(steps), strict=True):
            out.append(
                LoadRequest(
                    path,
                    file,
                    {w.name: table[w.name] for w in reads},
                    device,
                )
            )
    return out


def reads_of(steps: Sequence[Step]) -> list[list[TensorSpec]]:
    """The weights that every engine of a graph and the experts after it read."""
    out: list[list[TensorSpec]] = []
    for step in steps:
        if isinstance(step, EngineFile):
            out.append(list(step.weights))
        else:
            out[-1] += step.weights.values()
    return out


def _load_weights(
    store: WeightStore, bundle: Bundle, requests: Sequence[LoadRequest], progress: Progress | None
) -> None:
    """Loads weights to devices, hashing files not hashed before; unused files are not read."""
    read = {request.file for request in requests if request.weights}
    files: dict[str, FileRecord] = {
        name: file for name, file in bundle.files.items() if bundle.path / name in read
    }
    new = unverified_files(bundle.path, files)
    hashed = {bundle.path / name for name in new}
    for whether in (True, False):
        some = [request for request in requests if (request.file in hashed) == whether]
        store.load(some, hashed=whether, progress=progress)
    remember_files(bundle.path, new)
