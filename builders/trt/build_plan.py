"""The plan of one build of TensorRT or TensorRT for RTX: every engine with its key, what it costs, and the build itself."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import AUTO, DEFAULT_MAX_CONTEXT, KERNELS, BuildConfig, Report
from twotower.builders.build_cost import require_bound, require_build_memory
from twotower.builders.cache import EngineCache, kernel_source, open_cache
from twotower.builders.cache_keys import GpuIdentity
from twotower.builders.expert_cut import common_form, experts_of
from twotower.builders.expert_kernels import (
    DENSE_COST,
    Compile,
    ExpertChoice,
    choose_path,
    compile_code,
    require_compiler,
    require_kernels,
)
from twotower.builders.profiles import cache_capacity, profiles
from twotower.builders.segment import BundleGraphs
from twotower.builders.trt.capabilities import Capabilities, chosen_capabilities
from twotower.builders.trt.engine_inspector import expands_experts, require_fused
from twotower.builders.trt.engine_plan import EnginePlan, plan_key
from twotower.builders.trt.make_engine import EngineMaker
from twotower.builders.trt.pieces import Piece, least_build_memory, pieces_of, sum_float32_products
from twotower.builders.weight_inputs import WeightPlaces, place_weights
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    EngineFile,
    EngineLimits,
    EngineRecord,
    FileRecord,
    Step,
)
from twotower.errors import BuildError
from twotower.graph_lint import require_clean
from twotower.hardware import Machine, untried
from twotower.kernels.compile import compile_kernels
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.tensorrt_library import Flavour

__all__ = ["TensorRTPlan"]

logger = logging.getLogger(__name__)


class TensorRTPlan:
    """What one build makes of a bundle: decided when it is first asked for, once, each graph read once.

    Args:
        bundle: The graphs.
        config: What is asked for.
        flavour: The library.
        compiler: What compiles the kernels of experts; None for Triton, which may be missing.
        machine: Where the build runs.
        asked: What `TensorRTBuilder.asked` says of bundle and config, for the record.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: BuildConfig,
        *,
        flavour: Flavour,
        compiler: Compile | None,
        machine: Machine,
        asked: str,
    ) -> None:
        self._bundle, self._asked_for, self._asked = bundle, config, asked
        self._flavour, self._compiler, self._machine = flavour, compiler, machine
        self._graphs = BundleGraphs(bundle)

    @cached_property
    def choice(self) -> ExpertChoice:
        """What computes the experts, and why."""
        sms: tuple[int, ...] = ()
        if self._asked_for.experts == AUTO:
            sms = self._kernel_sms(replace(self._asked_for, experts=KERNELS, segments=1))
        return choose_path(self._bundle, self._asked_for, sms, experts_of(self._graphs))

    @cached_property
    def config(self) -> BuildConfig:
        """The options with what computes experts decided."""
        return replace(self._asked_for, experts=self.choice.experts)

    @cached_property
    def limits(self) -> EngineLimits:
        """What the engines will take.

        Raises:
            BuildError: the library does not build for what is asked for.
        """
        longest = self._bundle.config.max_position_embeddings
        capacity = cache_capacity(
            self.config.max_context or min(DEFAULT_MAX_CONTEXT, longest), longest
        )
        return EngineLimits(capacity, self.config.max_batch, self._capabilities(self.config).sms)

    @cached_property
    def kernel_sms(self) -> tuple[int, ...]:
        """Compute capabilities that kernels are compiled for: the engines', or all where the library chooses."""
        return self._kernel_sms(self.config)

    @cached_property
    def engines(self) -> tuple[EnginePlan, ...]:
        """Every engine of the build, in the order they run; equal programs of a tower have one file. All graphs are checked.

        Raises:
            BuildError: a graph cannot be built as it is asked for.
        """
        return tuple(self._planned())

    @cached_property
    def _cache(self) -> EngineCache | None:
        return open_cache(self._bundle, self.config)

    def keeps(self, record: EngineRecord) -> bool:
        """Whether sound engines that are already there are what is asked for."""
        if (
            record.report.get("choice_of_experts") != self.choice.to_json()
            or record.limits != self.limits
        ):
            return False
        if expands_experts(record) and not self.config.allow_expanded:
            return False
        made = [
            (e.file, e.layers, set(e.constants)) for parts in record.engines.values() for e in parts
        ]
        wanted = [
            (plan.engine.file, plan.engine.layers, set(plan.engine.constants))
            for plan in self.engines
        ]
        experts = [step for steps in record.experts.values() for step in steps]
        if made != wanted or experts != [
            plan.experts for plan in self.engines if plan.experts is not None
        ]:
            return False
        code = {"source": kernel_source(), "sms": list(self.kernel_sms)}
        if any(about | code != about for about in record.report.get("experts", {}).values()):
            return False
        return not self._flavour.sms or _same_keys(record, self.engines)

    def describe(self) -> list[str]:
        """What a build would do, a line each, without doing any of it."""
        for_what = (
            ", ".join(f"SM {sm}" for sm in self.limits.sms) or "the library's own set of GPUs"
        )
        rows = f"up to {self.limits.max_batch} rows, {self.limits.capacity} positions of keys and values"
        lines = [f"for         {for_what}; {self._bundle.dtype}; {rows}"]
        uses = Counter(plan.engine.file for plan in self.engines)
        lines += [self._line(plan, uses[plan.engine.file]) for plan in _distinct(self.engines)]
        if experts := sum(plan.experts is not None for plan in self.engines):
            sms = ", ".join(map(str, self.kernel_sms))
            self._require_compiler()
            lines.append(
                f"{'experts':<22}{experts} layers of experts between programs; kernels for SM {sms}"
            )
        if self.choice.why:
            lines.append(f"{'experts':<22}dense: {self.choice.why}; {DENSE_COST}")
        return lines

    @property
    def needed_bytes(self) -> int:
        """Disk space the engines will take."""
        _ = self.limits  # what cannot be built is said before space is asked for
        cache = self._cache
        shared = (
            cache is not None
            and not self.config.force
            and self.config.cache is None
            and cache.folder.is_dir()
        )
        if any(plan.experts is not None for plan in self.engines):
            self._require_compiler()
        found = cache.find if shared and cache is not None else lambda key: None
        return sum(plan.nbytes for plan in _distinct(self.engines) if not found(plan.key))

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        """Writes the engines into an empty folder and describes them."""
        started = time.perf_counter()
        if self._cache is not None:
            self._cache.prepare()
        if self._machine.rtx_any_sm and self._flavour.sms:
            logger.warning(
                "%s", untried(self._machine.rtx_any_sm, [gpu.sm for gpu in self._machine.gpus])
            )
        self._require_memory()
        code, about_code = compile_code(
            [plan.experts for plan in self.engines if plan.experts is not None],
            self.kernel_sms,
            folder,
            max_batch=self.limits.max_batch,
            compiler=self._compiler or compile_kernels,
            report=report,
        )
        files, facts = self._made(folder, report)
        return EngineRecord(
            target=self._flavour.target,
            library=self._flavour.library,
            dtype=self._bundle.dtype,
            graphs={name: self._bundle.program_identity(name) for name in GRAPH_FILES},
            weights={name: GRAPH_FILES[name] + DATA_SUFFIX for name in GRAPH_FILES},
            holds={
                plan.graph: self._bundle.data_identity(plan.graph)
                for plan in self.engines
                if plan.engine.constants
            },
            files=files | code,
            report={
                "seconds": round(time.perf_counter() - started, 2),
                "engines": facts,
                "experts": about_code,
                "choice_of_experts": self.choice.to_json(),
                "asked": self._asked,
            },
            limits=self.limits,
            steps=_steps(self.engines),
        )

    def _made(self, folder: Path, report: Report) -> tuple[dict[str, FileRecord], dict[str, Any]]:
        """Builds every engine, or takes it from the cache; what each is and what its build observed."""
        maker = EngineMaker(
            self._bundle, folder, self._cache, force=self.config.force, report=report
        )
        files: dict[str, FileRecord] = {}
        facts: dict[str, Any] = {}
        for plan in _distinct(self.engines):
            file = plan.engine.file
            files[file], made = maker.make(plan)
            if not self.config.allow_expanded:
                require_fused(plan.engine, made, readable=bool(self._flavour.sms))
            facts[file] = {
                **made,
                "weights": plan.places.to_json(),
                "notes": list(plan.notes),
                "operators": plan.operators,
            }
        return files, facts

    def _line(self, plan: EnginePlan, count: int) -> str:
        """One engine, as `--dry-run` shows it."""
        shapes = ", ".join(p.name for p in plan.engine.profiles)
        first, end = plan.engine.layers
        layers = f"layers {first} to {end - 1}; " if end > first else ""
        what = f"{count} programs; " if count > 1 else layers
        cost = (
            "in the cache"
            if self._cached(plan)
            else f"about {_gigabytes(plan.build_memory)} of memory to build"
        )
        return f"{plan.engine.file:<22}{what}{_described(plan.places)}{cost}; profiles {shapes}"

    def _cached(self, plan: EnginePlan) -> bool:
        return (
            self._cache is not None
            and not self.config.force
            and self._cache.find(plan.key) is not None
        )

    def _require_memory(self) -> None:
        """Refuses a build that does not fit this machine's memory, or the bound that was given."""
        needed = {
            plan.engine.file: plan.build_memory for plan in self.engines if not self._cached(plan)
        }
        programs = self.config.experts == KERNELS
        if programs:
            require_bound(needed, self.config.max_build_memory)
            least = max(plan.build_memory for plan in self.engines)
        else:
            least = least_build_memory(self._graphs, self.config.weights)
        require_build_memory(
            needed,
            least=least,
            available=self._machine.available,
            bound=self.config.max_build_memory,
        )

    def _require_compiler(self) -> None:
        if self._compiler is None:
            require_compiler()

    def _capabilities(self, config: BuildConfig) -> Capabilities:
        return chosen_capabilities(self._flavour, self._bundle, config, self._machine)

    def _kernel_sms(self, config: BuildConfig) -> tuple[int, ...]:
        """Where engines are tried on GPUs they hold no code for, kernels have to have it all the same."""
        sms = self._capabilities(config).sms or BUILDABLE_SMS
        if not (self._flavour.sms and self._machine.rtx_any_sm):
            return sms
        return tuple(
            sorted({*sms, *(gpu.sm for gpu in self._machine.gpus if gpu.sm in BUILDABLE_SMS)})
        )

    def _planned(self) -> Iterator[EnginePlan]:
        chosen = self._capabilities(self.config)
        gpu = self._gpu() if chosen.current or not self._flavour.sms else None
        files: dict[str, dict[str, str]] = {name: {} for name in GRAPH_FILES}
        sizes = {"T": self.limits.capacity, "S": self._bundle.trained_block_size}
        for piece in pieces_of(self._graphs, self.config, sizes):
            if piece.experts is not None:
                require_kernels(piece.experts, self.kernel_sms, max_batch=self.limits.max_batch)
            plan = self._engine(piece, chosen, gpu)
            known = files[piece.graph]
            file = known.setdefault(plan.key, piece.name or f"{piece.graph}.{len(known)}.engine")
            yield replace(plan, engine=replace(plan.engine, file=file))

    def _engine(self, piece: Piece, chosen: Capabilities, gpu: GpuIdentity | None) -> EnginePlan:
        """One engine; its file has no name yet."""
        bundle, made = self._bundle, piece.segment
        if chosen.half_only:
            sum_float32_products(made.model)
        notes, operators = (
            _notes(made.model, piece),
            Counter(node.op_type for node in made.model.graph.node),
        )
        places = place_weights(made.model, self.config.weights)
        if places.inside:
            bundle.require_weights(f"an engine that holds weights ({piece.name or piece.graph})")
        model, names = made.model, dict[str, str]()
        if piece.shared_from is not None:
            model, names = common_form(made.model, piece.shared_from)
        shapes = profiles(
            piece.graph, max_batch=self.limits.max_batch, block_size=bundle.trained_block_size
        )
        constants = tuple(places.inside)
        engine = EngineFile(
            piece.name,
            made.layers,
            made.inputs,
            made.outputs,
            shapes,
            places.inputs,
            constants,
            names,
        )
        job, data = self._job(engine, chosen), model.SerializeToString()
        holds = bundle.data_identity(piece.graph) if places.inside else ""
        return EnginePlan(
            graph=piece.graph,
            engine=engine,
            model=data,
            beside=bundle.graph_file(piece.graph),
            places=places,
            key=plan_key(job, data, holds=holds, library=self._flavour.library, gpu=gpu),
            job=job,
            notes=notes,
            operators=dict(operators.most_common()),
            experts=piece.experts,
        )

    def _job(self, engine: EngineFile, chosen: Capabilities) -> dict[str, Any]:
        target = self._flavour.target
        timings = (
            None if self._flavour.sms else str(self._bundle.path / "engines" / f".{target}.timing")
        )
        described = engine.to_json()
        return {
            "target": target,
            "inputs": [
                [engine.own(name), dtype, axes] for name, dtype, axes in described["inputs"]
            ],
            "profiles": described["profiles"],
            "sms": list(chosen.named),
            "current": chosen.current,
            "dtype": self._bundle.dtype,
            "timing_cache": timings,
        }

    def _gpu(self) -> GpuIdentity | None:
        """The GPU a library that builds for the one at hand builds for: the driver's first."""
        return next(
            (
                GpuIdentity(name=gpu.name, sm=gpu.sm, driver=self._machine.driver)
                for gpu in self._machine.gpus
            ),
            None,
        )


def _steps(plans: Iterable[EnginePlan]) -> dict[str, tuple[Step, ...]]:
    """What runs, in order, by graph: engines, and the experts after them."""
    steps: dict[str, tuple[Step, ...]] = {}
    for plan in plans:
        after = () if plan.experts is None else (plan.experts,)
        steps[plan.graph] = (*steps.get(plan.graph, ()), plan.engine, *after)
    return steps


def _same_keys(record: EngineRecord, plans: Iterable[EnginePlan]) -> bool:
    """Whether a build would make just these engines: another version of twotower may cut or configure differently.

    Not asked of an engine for the GPU at hand: its key holds the driver, and an engine outlives a
    driver.
    """
    observed = record.report.get("engines", {})
    return all(observed.get(plan.engine.file, {}).get("key") == plan.key for plan in plans)


def _distinct(plans: Iterable[EnginePlan]) -> list[EnginePlan]:
    """One plan a file: several programs of a tower may be equal."""
    out: dict[str, EnginePlan] = {}
    for plan in plans:
        out.setdefault(plan.engine.file, plan)
    return list(out.values())


def _notes(model: onnx.ModelProto, piece: Piece) -> tuple[dict[str, str], ...]:
    """What the very graph TensorRT is given costs there; an error in it refuses the build."""
    do = "export the checkpoint again with this version of twotower (docs/graph-rules.md explains each rule)"
    what = f"the graph of {piece.name or piece.graph}"
    return tuple(
        n.to_json() for n in require_clean(model, what, error=BuildError, do=do, fixed=True)
    )


def _described(places: WeightPlaces) -> str:
    parts = [f"{_gigabytes(places.input_bytes)} of weights as inputs"] if places.inputs else []
    parts += [f"{_gigabytes(places.inside_bytes)} inside"] if places.inside else []
    return "".join(f"{part}, " for part in parts)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
