"""Loads serialized TensorRT engines and checks them against the build record.

The library's lines go to Python's log, the last ones to the text of an error.
"""

from __future__ import annotations

import logging
import mmap
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twotower.bundle import EngineFile
from twotower.dtypes import DTYPES
from twotower.errors import DeviceError, EngineMismatchError
from twotower.files import write_atomically
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.tensorrt_library import Variant

logger = logging.getLogger(__name__)

_DTYPES = {kind.tensorrt: name for name, kind in DTYPES.items() if kind.tensorrt}


@dataclass(frozen=True, slots=True)
class Plan:
    """One engine in the memory of a device.

    Attributes:
        scratch: Bytes of activation memory an execution needs.
        cache: Kernels the library compiled for it so far; None for a library that compiles nothing
            at run time.
        config: What made the cache; the library does not keep it.
    """

    part: EngineFile
    device: int
    engine: Any
    scratch: int
    cache: Any = None
    cache_file: Path | None = None
    config: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a context is bound to: profile, and shapes and device addresses by tensor name."""

    profile: int
    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    scratch: tuple[int, int]


class Execution:
    """An execution context with what must outlive it and the library does not keep.

    Attributes are released in the order they are set, with or without `close`: the context first.
    """

    def __init__(
        self,
        context: Any,
        config: Any,
        plan: Plan,
        loader: PlanLoader,
    ) -> None:
        self.context, self._config, self.plan = context, config, plan
        self._loader = loader

    def bind(self, to: Bound, memory: DeviceMemory) -> None:
        """Sets profile, shapes, addresses and scratch on its device; DeviceError if refused."""
        stream = memory.stream(self.plan.device)
        chosen = self.context.set_optimization_profile_async(to.profile, stream)
        memory.cuda.synchronize(stream)  # the next call needs the profile
        refused = [] if chosen else [f"profile {to.profile}"]
        for name, shape in to.shapes.items():
            if not self.context.set_input_shape(name, shape):
                refused.append(f"shape {shape} of {name}")
        for name, address in to.addresses.items():
            if not self.context.set_tensor_address(name, address):
                refused.append(f"address of {name}")
        if not refused:
            try:
                refused = [f"{name} has no shape" for name in self.context.infer_shapes()]
            except RuntimeError as e:
                refused = [f"shapes cannot be inferred: {e}"]
        refused = refused or self._without_scratch(*to.scratch)
        if refused:
            said = self._loader.drain()
            raise DeviceError(
                f"{self.plan.part.file} cannot be bound",
                found="; ".join(refused[:5]) + (f": {said}" if said else ""),
                do="report this with `twotower doctor`",
            )

    def _without_scratch(self, address: int, size: int) -> list[str]:
        """Sets the activation memory; what the library does not take it says in its log alone."""
        needed = int(self.context.update_device_memory_size_for_shapes())
        if needed > size:
            return [f"it needs {needed:,} bytes of activation memory, {size:,} were allocated"]
        self._loader.drain()
        self.context.set_device_memory(address, size)
        said = self._loader.drain(errors=True)
        if not said:
            return []
        return [f"activation memory of {size:,} bytes: {said}"]

    def enqueue(self, stream: int) -> None:
        """Enqueues on a stream of its current device; DeviceError if refused."""
        if not self.context.execute_async_v3(stream):
            said = self._loader.drain()
            raise DeviceError(
                f"{self.plan.part.file} was not run",
                found="the library refused to enqueue it" + (f": {said}" if said else ""),
                do="run `twotower doctor BUNDLE`; an engine built for another GPU fails like this",
            )

    def may_be_captured(self, stream: int) -> bool:
        """What the library says, if it can be asked; a refusal is logged once an engine."""
        loader, file = self._loader, self.plan.part.file
        if not loader.variant.capturable:
            return True
        loader.drain()
        if self.context.is_stream_capturable(stream):
            return True
        words = loader.drain() or "it gives no reason"
        if file not in loader.uncapturable:
            what = "%s cannot be captured and is launched piece by piece: %s"
            logger.warning(what, file, words)
            loader.uncapturable.add(file)
        return False

    def close(self) -> None:
        """Frees the context; idempotent."""
        self.context = None
        self._config = None


class PlanLoader:
    """Loads engines with one library.

    Args:
        in_place: Outputs that must be the memory of an input, by name (keys and values), with that
            input.
        sms: Compute capabilities of devices, by number: compiled kernels are kept apart by them.
    """

    def __init__(
        self,
        variant: Variant,
        cuda: Cuda,
        in_place: Mapping[str, str],
        sms: Mapping[int, int] | None = None,
    ) -> None:
        self.variant, self.cuda = variant, cuda
        self.uncapturable: set[str] = set()  # engines whose refusal was logged
        self._in_place = in_place
        self._sms = sms or {}
        self._log = library_log(variant.module)
        self._runtime = variant.module.Runtime(self._log.logger)
        # Engines of which contexts were made since their kernels were saved, by identity.
        self._unsaved: dict[int, Plan] = {}

    def load(self, file: Path, part: EngineFile, device: int) -> Plan:
        """Brings an engine to the current device, which must be `device`; the file is mapped.

        Raises:
            EngineMismatchError: the library refuses the file, or it is not the engine the build
                describes.
        """
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            engine = self._runtime.deserialize_cuda_engine(mapped)
        if engine is None:
            raise EngineMismatchError(
                f"{self.variant.module.__name__} {self.variant.version} cannot load {file}",
                found=self.drain()
                or "it gives no reason; the engine may be for another GPU or damaged",
                do="build it again on or for this machine with "
                "`twotower build BUNDLE --target ... --force`",
            )
        self._check(engine, part, file)
        cache, cache_file, config = None, None, None
        if self.variant.runtime_cache:
            cache_file = self._cache_file(file, device)
            config = engine.create_runtime_config()
            cache = config.create_runtime_cache()
            if cache_file.is_file() and not cache.deserialize(cache_file.read_bytes()):
                logger.info(
                    "%s is of another GPU, driver or library; kernels are compiled again",
                    cache_file,
                )
        return Plan(
            part, device, engine, int(engine.device_memory_size_v2), cache, cache_file, config
        )

    def another(self, plan: Plan, part: EngineFile, file: Path) -> Plan:
        """The engine again, for an equal program; EngineMismatchError if it is not equal."""
        self._check(plan.engine, part, file)
        return replace(plan, part=part)

    def _cache_file(self, file: Path, device: int) -> Path:
        """Where an engine's kernels are kept: those of another library or GPU lie beside them."""
        sm = f"-sm{self._sms[device]}" if device in self._sms else ""
        return file.with_name(f".{file.name}.{self.variant.version}{sm}.kernels")

    def context(self, plan: Plan, *, specialised: bool) -> Execution:
        """An execution context without activation memory of its own.

        `specialised` compiles kernels for its one shape in the first run, and not behind the first
        runs, which a captured graph would freeze.
        """
        trt = self.variant.module
        config = plan.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if plan.cache is not None:
            config.set_runtime_cache(plan.cache)
            config.cuda_graph_strategy = (
                trt.CudaGraphStrategy.DISABLED
            )  # a whole pass is captured here, copies included
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            kind = kinds.EAGER if specialised else kinds.NONE
            config.dynamic_shapes_kernel_specialization_strategy = kind
            self._unsaved[id(plan.engine)] = plan
        context = plan.engine.create_execution_context(config)
        if context is None:
            raise DeviceError(
                f"no execution context for {plan.part.file}",
                found=self.drain() or "the library gives no reason",
                do="free GPU memory, or build with a smaller --max-batch or --max-context",
            )
        if hasattr(
            context, "nvtx_verbosity"
        ):  # as detailed as the engine, unless told: every enqueue pays for it
            context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        return Execution(context, config, plan, self)

    def keep_kernels(self) -> None:
        """Saves newly compiled kernels for the next opening, if the bundle is writable."""
        plans = list(self._unsaved.values())
        self._unsaved.clear()
        for plan in plans:
            if plan.cache is None or plan.cache_file is None:
                continue
            self.cuda.use(plan.device)
            data = bytes(plan.cache.serialize())
            try:
                if not plan.cache_file.is_file() or plan.cache_file.read_bytes() != data:
                    write_atomically(plan.cache_file, data)
            except OSError as e:
                logger.info("compiled kernels are not kept: %s", e)

    def drain(self, *, errors: bool = False) -> str:
        """What the library said last, and forgets it: warnings and worse, or errors alone."""
        return self._log.drain(errors=errors)

    def _check(self, engine: Any, part: EngineFile, file: Path) -> None:
        """Holds an engine's names, types and shared addresses against the build's description."""
        has = {
            name: engine.get_tensor_dtype(name).name
            for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        }
        wants = {part.own(spec.name): spec for spec in (*part.inputs, *part.outputs, *part.weights)}
        problems = [f"{name} is missing" for name in sorted(set(wants) - set(has))]
        problems += [f"{name} is not expected" for name in sorted(set(has) - set(wants))]
        problems += [
            f"{name} is {has[name]}, expected {spec.dtype}"
            for name, spec in wants.items()
            if name in has and _DTYPES.get(has[name]) != spec.dtype
        ]
        if not problems:
            problems = [
                f"{w.name} has shape {list(shape)}, expected {list(w.axes)}"
                for w in part.weights
                if (shape := tuple(engine.get_tensor_shape(part.own(w.name)))) != w.axes
            ]
            problems += [
                f"{out.name} does not share the memory of {past}"
                for out in part.outputs
                if (past := self._in_place.get(out.name))
                and engine.get_aliased_input_tensor(part.own(out.name)) != part.own(past)
            ]
        if problems:
            raise EngineMismatchError(
                f"{file} is not the engine its build.json describes",
                found="; ".join(problems[:5]),
                do="build it again with `twotower build BUNDLE --target ... --force`",
            )


_KEPT_LINES = 8


class LibraryLog:
    """The lines of one library, which has one logger a process: the first it is given."""

    def __init__(self, trt: Any) -> None:
        self._said: deque[tuple[bool, str]] = deque(maxlen=_KEPT_LINES)
        self.logger = _make_logger(trt, self._said)

    def drain(self, *, errors: bool = False) -> str:
        """What was said last, which is then forgotten: warnings and worse, or errors alone."""
        said: list[str] = []
        while self._said:  # one by one: the library's own threads may be adding lines
            error, line = self._said.popleft()
            if error or not errors:
                said.append(line)
        return "; ".join(said)


def library_log(trt: Any) -> LibraryLog:
    """The log of a library, one for a process: a second logger would hear nothing."""
    name = str(trt.__name__)
    if name not in _LOGS:
        _LOGS[name] = LibraryLog(trt)
    return _LOGS[name]


_LOGS: dict[str, LibraryLog] = {}


def _make_logger(trt: Any, said: deque[tuple[bool, str]]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Passes lines on."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            serious = severity.value <= trt.ILogger.Severity.WARNING.value
            error = severity.value <= trt.ILogger.Severity.ERROR.value
            logger.log(
                logging.INFO if serious else logging.DEBUG,
                "%s: %s",
                severity.name,
                message,
            )
            if serious:
                said.append((error, " ".join(message.split())))

    return Logger()
