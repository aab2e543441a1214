"""ONNX Runtime on GPUs: sessions on the towers' streams, with experts between them.

Its CUDA provider enqueues on the stream given to a session and does not wait at the end of a pass,
so passes are ordered by events as on TensorRT. Its own CUDA graphs are not used. **It has never run
on a GPU**; all but the provider is tested without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from twotower.bundle import (
    Bundle,
    EngineFile,
    EngineRecord,
    ExpertsStep,
    engine_folder,
    read_engine_record,
    weight_bytes,
)
from twotower.dtypes import carried_dtype, onnx_code
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.device_engine import DeviceEngine, PassBuffers
from twotower.runtime.engines.device_opening import DeviceOpening, check_weights, chosen_devices
from twotower.runtime.engines.handover import handed_bytes, with_tokens
from twotower.runtime.engines.pass_steps import BoundProgram
from twotower.runtime.engines.towers import OpenOptions, Towers
from twotower.runtime.schedule import row_counts
from twotower.spec import MAX_CHUNK, signatures

TARGET = "ort-cuda"
_MOST_ROWS = 1 << 12  # sessions take any number; beyond this a batch is not padded


class OrtLibrary(Protocol):
    """The parts of ONNX Runtime needed on a GPU; engines are tied to its version."""

    version: str
    device_type: str

    def session(
        self,
        graph: Path,
        folder: Path,
        *,
        device: int,
        stream: int,
    ) -> Any:
        """A session of a graph on a device and a CUDA stream; weights are named from `folder`."""
        ...

    def run_options(self) -> Any:
        """Options of a pass that does not wait for its own end."""
        ...


def open_ort_cuda(
    bundle: Bundle, library: OrtLibrary, cuda: Cuda, options: OpenOptions | None = None
) -> Towers:
    """Opens the three `ort-cuda` graphs of a bundle, on one GPU or spread over several.

    Raises:
        EngineMismatchError: not built, damaged, of another ONNX Runtime or graph, too large, or
            CUDA cannot be used.
        ConfigError: a device that is not there was asked for.
    """
    how = options or OpenOptions()
    name_and_version = {"name": "onnxruntime", "version": library.version}
    record = read_engine_record(bundle, TARGET, library=name_and_version, progress=how.progress)
    devices = chosen_devices(cuda, how.devices)
    contract = signatures(bundle.config, record.dtype)
    steps = dict(record.steps)
    if not steps:  # each graph is its only step
        layers = (0, len(bundle.config.layers))
        for name, graph in contract.items():
            steps[name] = (EngineFile(f"{name}.onnx", layers, graph.inputs, graph.outputs, ()),)
    sizes = {name: _sizes(bundle, record, name) for name in steps}
    opening = DeviceOpening(bundle, record, cuda, devices, steps, sizes)
    opening.require_room()
    if record.steps:
        check_weights(record, bundle)
    limits = record.limits
    with Cleanup() as undo:
        shared = opening.shared(undo, how.loading)
        queues = opening.queues(undo)
        if shared.experts is not None:
            assert limits is not None, "engines with experts between have limits"
            most = {"B": limits.max_batch, "L": MAX_CHUNK, "S": bundle.trained_block_size}
            used = {device for places in opening.placed.values() for device in places}
            # Sessions bring scratch memory of their own.
            shared.allocate(
                steps.values(),
                scratch=dict.fromkeys(used, 0),
                sizes=most,
            )
        engines: dict[str, OrtDeviceEngine] = {}
        for name, signature in contract.items():
            places, loaded = iter(opening.placed[name]), list[_Program | ExpertsStep]()
            for step in steps[name]:
                if isinstance(step, EngineFile):
                    device = next(places)
                    file = engine_folder(bundle, TARGET) / step.file
                    stream = queues[name].handles[device]
                    session = library.session(file, bundle.path, device=device, stream=stream)
                    loaded.append(_Program(step, device, session, library))
                else:
                    loaded.append(step)
            data, copies = bundle.data_file(name), opening.copies(name)
            engines[name] = OrtDeviceEngine(signature, loaded, shared, data=data, copies=copies)
        towers = opening.towers(
            engines,
            shared,
            queues,
            row_counts=row_counts(_MOST_ROWS if limits is None else limits.max_batch),
            fixed_block=bundle.trained_block_size if limits is not None else None,
        )
        undo.pop_all()
    return towers


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


@dataclass(frozen=True, slots=True)
class _Program:
    """A session on a device, made for the stream of its passes; the build describes its graph."""

    part: EngineFile
    device: int
    session: Any
    library: OrtLibrary


class OrtDeviceEngine(DeviceEngine[_Program]):
    """One graph of the contract in sessions of ONNX Runtime."""

    def _bind_programs(self, buffers: PassBuffers) -> Iterator[BoundProgram]:
        for index, program in enumerate(self._programs):
            part, library = program.part, program.library
            addresses = self._addresses(program, index, buffers)
            sizes = with_tokens(part, buffers.sizes)
            binding = program.session.io_binding()
            number = program.device if library.device_type == "cuda" else 0
            binders = [(spec, binding.bind_input) for spec in part.inputs]
            binders += [(spec, binding.bind_output) for spec in part.outputs]
            for spec, bind in binders:
                known = buffers.arrays.get(spec.name)
                shape = spec.shape(sizes) if known is None else known.shape
                # NumPy has no bfloat16: that is given by its ONNX number.
                element: Any = carried_dtype(spec.dtype).type
                if spec.dtype == "bfloat16":
                    element = onnx_code(spec.dtype)
                address = addresses[spec.name]
                bind(spec.name, library.device_type, number, element, shape, address)
            yield BoundProgram(
                part=part,
                device=program.device,
                index=index,
                takes=handed_bytes(part, buffers.sizes),
                enqueue=partial(_run, program.session, binding, library.run_options()),
                close=lambda: None,
            )


def _run(
    session: Any,
    binding: Any,
    options: Any,
    stream: int,
) -> None:
    """Runs on the stream that the session was made for, which is this one."""
    session.run_with_iobinding(binding, options)
