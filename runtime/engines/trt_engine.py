"""TensorRT on GPUs: engines opened, placed and loaded once, and graphs bound to fixed addresses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from twotower.bundle import (
    Bundle,
    EngineFile,
    EngineRecord,
    ExpertsStep,
    Profile,
    engine_folder,
    read_engine_record,
)
from twotower.dtypes import carried_dtype
from twotower.errors import EngineMismatchError, RequestError
from twotower.hardware import Gpu, untried
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.engines.device_engine import DeviceEngine, PassBuffers
from twotower.runtime.engines.device_opening import (
    DeviceOpening,
    check_weights,
    chosen_devices,
    reads_of,
)
from twotower.runtime.engines.handover import handed_bytes
from twotower.runtime.engines.pass_steps import BoundProgram, PassSteps, StateCopies
from twotower.runtime.engines.shared_resources import SharedResources
from twotower.runtime.engines.towers import OpenOptions, Towers
from twotower.runtime.engines.trt_plan import Bound, Plan, PlanLoader
from twotower.runtime.schedule import row_counts
from twotower.spec import MAX_CHUNK, TowerSignature, signatures
from twotower.tensorrt_library import Variant

logger = logging.getLogger(__name__)


def open_tensorrt(
    bundle: Bundle,
    variant: Variant,
    cuda: Cuda,
    options: OpenOptions,
) -> Towers:
    """Opens the three graphs of a bundle on TensorRT.

    Raises:
        EngineMismatchError: not built, damaged, of another library, graph or GPU, too large for the
            GPU, or there is none.
        ConfigError: a device that is not there was asked for.
    """
    record = read_engine_record(
        bundle, variant.target, library=variant.library, progress=options.progress
    )
    limits = record.limits
    assert limits is not None, "TensorRT engines have limits"
    devices = chosen_devices(cuda, options.devices)
    chosen = [options.gpus[d] for d in devices if d < len(options.gpus)]
    _check_sms(record, chosen, bundle, options.any_sm)
    check_weights(record, bundle)
    sizes = {name: _sizes(bundle, record, name) for name in record.engines}
    opening = DeviceOpening(bundle, record, cuda, devices, record.steps, sizes)
    state: dict[str, int] = {}
    for tensor in opening.state:
        past = tensor.past
        size = prod(past.shape({"B": 1, "T": limits.capacity})) * carried_dtype(past.dtype).itemsize
        state[past.name] = size if tensor.in_place else 2 * size
    opening.require_room(state)
    with Cleanup() as undo:
        shared = opening.shared(undo, options.loading)
        queues = opening.queues(undo)
        in_place = {t.present.name: t.past.name for t in opening.state if t.in_place}
        sms = {number: gpu.sm for number, gpu in enumerate(options.gpus)}
        loader = PlanLoader(variant, cuda, in_place, sms)
        steps, scratch = dict[str, list[Plan | ExpertsStep]](), dict[int, int]()
        for name, places in opening.placed.items():
            steps[name] = load_steps(bundle, record, name, devices=places, loader=loader)
            for step in steps[name]:
                if isinstance(step, Plan):
                    scratch[step.device] = max(step.scratch, scratch.get(step.device, 0))
        most = {"B": limits.max_batch, "L": MAX_CHUNK}
        shared.allocate(record.steps.values(), scratch=scratch, sizes=most)
        fixed = {"T": limits.capacity, "S": bundle.trained_block_size}
        rows = row_counts(limits.max_batch)
        engines: dict[str, TensorRTEngine] = {}
        for name, signature in signatures(bundle.config, record.dtype).items():
            engines[name] = TensorRTEngine(
                signature.with_sizes(fixed),
                steps[name],
                shared,
                PassOptions(loader, rows, options.graphs),
                data=bundle.data_file(name),
                copies=opening.copies(name),
            )
        towers = opening.towers(
            engines,
            shared,
            queues,
            row_counts=rows,
            compiles=variant.runtime_cache,
            keep=loader.keep_kernels,
            fixed_block=bundle.trained_block_size,
        )
        undo.pop_all()
    return towers


def _sizes(bundle: Bundle, record: EngineRecord, name: str) -> list[int]:
    """Bytes of each engine and the weights read there; a shared file counts once."""
    table, known, out = bundle.weights(name), set[str](), list[int]()
    for part, reads in zip(
        record.engines[name],
        reads_of(record.steps[name]),
        strict=True,
    ):
        size = sum(table[weight.name].nbytes for weight in reads)
        if part.file not in known:
            size += record.files[part.file].size
        known.add(part.file)
        out.append(size)
    return out


def _check_sms(
    record: EngineRecord,
    gpus: Sequence[Gpu],
    bundle: Bundle,
    any_sm: str,
) -> None:
    assert record.limits is not None
    sms = record.limits.sms
    foreign = [gpu for gpu in gpus if sms and gpu.sm not in sms]
    if any_sm and record.target == "rtx":
        built = "built for the library's own set"
        if sms:
            built = f"built for SM {', '.join(map(str, sms))}"
        logger.warning(
            "%s; the engines are %s",
            untried(any_sm, [gpu.sm for gpu in gpus]),
            built,
        )
    elif foreign:
        built = ", ".join(map(str, sms))
        wanted = ",".join(map(str, sorted({*sms, foreign[0].sm})))
        rebuild = f"`twotower build {bundle.path} --target {record.target}"
        do = f"{rebuild}` on this machine"
        if record.target == "rtx":
            do = f"{rebuild} --sm {wanted}`"
        raise EngineMismatchError(
            f"the {record.target} engines of '{bundle.path}' hold no code for {foreign[0].name}",
            found=f"it is SM {foreign[0].sm}; they were built for SM {built}",
            do=do,
        )


def load_steps(
    bundle: Bundle, record: EngineRecord, name: str, *, devices: Sequence[int], loader: PlanLoader
) -> list[Plan | ExpertsStep]:
    """The steps of a graph with every engine on its device, each file once a device."""
    cuda, folder = loader.cuda, engine_folder(bundle, record.target)
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
            out.append(
                loader.another(
                    known[step.file, device],
                    step,
                    file,
                )
            )
            continue
        before = cuda.free_memory()[0]
        plan = loader.load(file, step, device)
        taken, size = before - cuda.free_memory()[0], record.files[step.file].size
        logger.info("%s, %d bytes, took %d bytes of GPU %d", step.file, size, taken, device)
        known[step.file, device] = plan
        out.append(plan)
    return out


@dataclass(frozen=True, slots=True)
class PassOptions:
    """How passes run on TensorRT; kernels are specialised for the numbers of `rows`."""

    loader: PlanLoader
    rows: tuple[int, ...] = ()
    graphs: bool = True


class TensorRTEngine(DeviceEngine[Plan]):
    """One graph on TensorRT: one engine, segments, or programs with experts between."""

    def __init__(
        self,
        signature: TowerSignature,
        steps: Sequence[Plan | ExpertsStep],
        shared: SharedResources,
        options: PassOptions,
        *,
        data: Path,
        copies: StateCopies | None = None,
    ) -> None:
        super().__init__(signature, steps, shared, data=data, copies=copies)
        self._options = options

    def _profiles(self, sizes: Mapping[str, int]) -> list[int]:
        """The number of the profile of each program."""
        return [_profile(plan, sizes) for plan in self._programs]

    def _is_fixed(self, profiles: Sequence[int]) -> bool:
        """Whether profiles admit one shape only, apart from the number of rows."""
        for number, plan in zip(profiles, self._programs, strict=True):
            for axis, (least, _, most) in plan.part.profiles[number].axes.items():
                if axis != "B" and least != most:
                    return False
        return True

    def _bind_programs(self, buffers: PassBuffers) -> Iterator[BoundProgram]:
        """An execution context for each program, with its profile, shapes and addresses set."""
        shared, loader, sizes = self._shared, self._options.loader, buffers.sizes
        profiles = self._profiles(sizes)
        specialised = self._is_fixed(profiles) and sizes.get("B") in self._options.rows
        for index, plan in enumerate(self._programs):
            device, part = plan.device, plan.part
            shared.cuda.use(device)
            execution = loader.context(plan, specialised=specialised)
            addresses = self._addresses(plan, index, buffers)
            for weight in part.weights:
                addresses[weight.name] = shared.weights.address(self._data, weight.name, device)
            to = Bound(
                profile=profiles[index],
                shapes={part.own(spec.name): spec.shape(sizes) for spec in part.inputs},
                addresses={part.own(name): address for name, address in addresses.items()},
                scratch=shared.scratch[device],
            )
            execution.bind(to, shared.memory)
            yield BoundProgram(
                part=part,
                device=device,
                index=index,
                takes=handed_bytes(part, sizes),
                enqueue=execution.enqueue,
                close=execution.close,
                may_be_captured=execution.may_be_captured,
            )

    def _capturable(self, run: PassSteps, buffers: PassBuffers) -> Callable[[CudaStream], bool]:
        fixed = self._is_fixed(self._profiles(buffers.sizes))
        allowed = fixed and self._options.graphs and run.same_every_time
        return lambda queue: allowed and run.may_be_captured(queue)

    def _keep_kernels(self) -> None:
        self._options.loader.keep_kernels()


def _profile(plan: Plan, sizes: Mapping[str, int]) -> int:
    """The narrowest profile that admits the shapes: later ones are narrower."""
    profiles = plan.part.profiles
    for number, profile in reversed(list(enumerate(profiles))):
        if profile.admits(sizes):
            return number
    raise RequestError(
        f"{plan.part.file} was not built for these shapes",
        found=f"{dict(sizes)}; built for {'; '.join(map(_described, profiles))}",
        do="build it with a larger --max-batch",
    )


def _described(profile: Profile) -> str:
    axes = [f"{axis} {least} to {most}" for axis, (least, _, most) in profile.axes.items()]
    return f"{profile.name}: {', '.join(axes)}"
