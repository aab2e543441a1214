"""The plan of one build of TensorRT or TensorRT for RTX: engines, their costs, and the build."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from twotower.builders.base import AUTO, KERNELS, BuildConfig, Report, engine_record
from twotower.builders.build_cost import require_bound, require_build_memory
from twotower.builders.cache import EngineCache, kernel_source, open_cache
from twotower.builders.expert_cut import experts_of
from twotower.builders.expert_kernels import (
    DENSE_COST,
    Compile,
    ExpertChoice,
    choose_path,
    compile_code,
    require_compiler,
    require_kernels,
)
from twotower.builders.profiles import cache_capacity
from twotower.builders.segment import BundleGraphs
from twotower.builders.trt.capabilities import Capabilities, chosen_capabilities
from twotower.builders.trt.engine_inspector import expands_experts, require_fused
from twotower.builders.trt.engine_plan import EnginePlan, EnginePlanner, least_build_memory
from twotower.builders.trt.make_engine import EngineMaker
from twotower.bundle import (
    Bundle,
    EngineLimits,
    EngineRecord,
    ExpertsStep,
    FileRecord,
    Step,
    file_records,
)
from twotower.hardware import Machine, untried
from twotower.kernels.compile import compile_kernels
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.tensorrt_library import Variant
from twotower.units import format_bytes

logger = logging.getLogger(__name__)


class TensorRTPlan:
    """What one build makes of a bundle; each decision is made once, when first asked for.

    `asked` is the digest of `TensorRTBuilder.asked`; `compiler` of expert kernels is Triton if
    None.
    """

    def __init__(
        self,
        bundle: Bundle,
        config: BuildConfig,
        *,
        variant: Variant,
        compiler: Compile | None,
        machine: Machine,
        asked: str,
    ) -> None:
        self._bundle, self._asked_for, self._asked = bundle, config, asked
        self._variant, self._compiler, self._machine = variant, compiler, machine
        self._graphs = BundleGraphs(bundle)

    @cached_property
    def choice(self) -> ExpertChoice:
        """What computes the experts, and why."""
        sms: tuple[int, ...] = ()
        if self._asked_for.experts == AUTO:
            sms = self._kernel_sms(replace(self._asked_for, experts=KERNELS, segments=1))
        return choose_path(
            self._bundle,
            self._asked_for,
            sms,
            experts_of(self._graphs),
        )

    @cached_property
    def config(self) -> BuildConfig:
        """The options with what computes experts decided."""
        return replace(self._asked_for, experts=self.choice.experts)

    @cached_property
    def limits(self) -> EngineLimits:
        """What the engines will take; BuildError if the library does not support it."""
        longest = self._bundle.config.max_position_embeddings
        capacity = cache_capacity(self.config.max_context, longest)
        return EngineLimits(
            capacity,
            self.config.max_batch,
            self._capabilities(self.config).sms,
        )

    @cached_property
    def kernel_sms(self) -> tuple[int, ...]:
        """Compute capabilities of kernels: the engines', or all where the library chooses."""
        return self._kernel_sms(self.config)

    @cached_property
    def engines(self) -> tuple[EnginePlan, ...]:
        """Engines in running order, equal programs sharing a file; may raise BuildError."""
        limits, chosen = self.limits, self._capabilities(self.config)
        gpu = None
        if self._machine.gpus and (chosen.current or not self._variant.sms):
            first = self._machine.gpus[0]  # a library builds for the driver's first
            gpu = {
                "name": first.name,
                "sm": first.sm,
                "driver": self._machine.driver,
            }
        planner = EnginePlanner(
            self._graphs,
            self.config,
            variant=self._variant,
            limits=limits,
            chosen=chosen,
            gpu=gpu,
        )
        engines = []
        for plan in planner.engines():
            if plan.experts is not None:
                require_kernels(plan.experts, self.kernel_sms, max_batch=limits.max_batch)
            engines.append(plan)
        return tuple(engines)

    @cached_property
    def _files(self) -> list[EnginePlan]:
        """One plan a file."""
        out: dict[str, EnginePlan] = {}
        for plan in self.engines:
            out.setdefault(plan.engine.file, plan)
        return list(out.values())

    @cached_property
    def _experts(self) -> list[ExpertsStep]:
        return [plan.experts for plan in self.engines if plan.experts is not None]

    @cached_property
    def _cache(self) -> EngineCache | None:
        return open_cache(self._bundle, self.config)

    def keeps(self, record: EngineRecord) -> bool:
        """Whether sound engines that are already there are what is asked for.

        Another version of twotower may cut or configure differently, which keys tell. Those of
        engines for the GPU at hand are not compared: they hold the driver, which engines outlive.
        """
        report = record.report
        if report.get("choice_of_experts") != self.choice.to_json() or record.limits != self.limits:
            return False
        if expands_experts(record) and not self.config.allow_expanded:
            return False
        made = [
            (e.file, e.layers, set(e.constants)) for parts in record.engines.values() for e in parts
        ]
        wanted = [(p.engine.file, p.engine.layers, set(p.engine.constants)) for p in self.engines]
        experts = [step for steps in record.experts.values() for step in steps]
        if made != wanted or experts != self._experts:
            return False
        code = {"source": kernel_source(), "sms": list(self.kernel_sms)}
        if any(about | code != about for about in report.get("experts", {}).values()):
            return False
        facts = report.get("engines", {})
        keys = {file: about.get("key") for file, about in facts.items()}
        return not self._variant.sms or all(
            keys.get(plan.engine.file) == plan.key for plan in self.engines
        )

    def describe(self) -> list[str]:
        """What a build would do, a line each, without doing any of it."""
        sms = ", ".join(f"SM {sm}" for sm in self.limits.sms) or "the library's own set of GPUs"
        rows = f"up to {self.limits.max_batch} rows"
        capacity = f"{self.limits.capacity} positions of keys and values"
        lines = [f"for         {sms}; {self._bundle.dtype}; {rows}, {capacity}"]
        uses = Counter(plan.engine.file for plan in self.engines)
        lines += [self._line(plan, uses[plan.engine.file]) for plan in self._files]
        if self._experts:
            require_compiler(self._compiler)
            what = f"{len(self._experts)} layers of experts between programs"
            kernels = f"kernels for SM {', '.join(map(str, self.kernel_sms))}"
            lines.append(f"{'experts':<22}{what}; {kernels}")
        if self.choice.why:
            lines.append(f"{'experts':<22}dense: {self.choice.why}; {DENSE_COST}")
        return lines

    def _line(self, plan: EnginePlan, count: int) -> str:
        """One engine, as `--dry-run` shows it."""
        (first, end), places = plan.engine.layers, plan.places
        parts = []
        if places.inputs:
            parts.append(f"{format_bytes(places.input_bytes)} of weights as inputs")
        if places.inside:
            parts.append(f"{format_bytes(places.inside_bytes)} inside")
        if self._cached(plan):
            parts.append("in the cache")
        else:
            parts.append(f"about {format_bytes(plan.build_memory)} of memory to build")
        what = ""
        if count > 1:
            what = f"{count} programs; "
        elif end > first:
            what = f"layers {first} to {end - 1}; "
        shapes = ", ".join(p.name for p in plan.engine.profiles)
        return f"{plan.engine.file:<22}{what}{', '.join(parts)}; profiles {shapes}"

    @property
    def needed_bytes(self) -> int:
        """Disk space the engines will take; those in the bundle's own cache are linked."""
        if self._experts:
            require_compiler(self._compiler)
        linked = self.config.cache is None
        return sum(p.nbytes for p in self._files if not (linked and self._cached(p)))

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        """Writes the engines into an empty folder and describes them."""
        started = time.perf_counter()
        if self._cache is not None:
            self._cache.prepare()
        if self._machine.rtx_any_sm and self._variant.sms:
            gpus = [gpu.sm for gpu in self._machine.gpus]
            logger.warning("%s", untried(self._machine.rtx_any_sm, gpus))
        self._require_memory()
        about_code = compile_code(
            self._experts,
            self.kernel_sms,
            folder,
            max_batch=self.limits.max_batch,
            compiler=self._compiler or compile_kernels,
            report=report,
        )
        files, facts = self._made(folder, report)
        bundle = self._bundle
        return engine_record(
            bundle,
            self._variant.target,
            self._variant.library,
            holds={
                plan.graph: bundle.data_identity(plan.graph)
                for plan in self.engines
                if plan.engine.constants
            },
            files=file_records(folder, files),
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
        """Makes every engine; the files, and what the build of each observed."""
        maker = EngineMaker(
            self._bundle, folder, self._cache, force=self.config.force, report=report
        )
        files: dict[str, FileRecord] = {}
        facts: dict[str, Any] = {}
        for plan in self._files:
            file = plan.engine.file
            files[file], made = maker.make(plan)
            if not self.config.allow_expanded:
                require_fused(plan.engine, made, readable=bool(self._variant.sms))
            facts[file] = {
                **made,
                "weights": plan.places.to_json(),
                "notes": list(plan.notes),
                "operators": plan.operators,
            }
        return files, facts

    def _cached(self, plan: EnginePlan) -> bool:
        cache = None if self.config.force else self._cache
        return cache is not None and cache.find(plan.key) is not None

    def _require_memory(self) -> None:
        """Refuses a build that does not fit this machine's memory, or the bound that was given."""
        needed = {p.engine.file: p.build_memory for p in self.engines if not self._cached(p)}
        bound = self.config.max_build_memory
        if self.config.experts == KERNELS:
            require_bound(needed, bound)
            least = max(plan.build_memory for plan in self.engines)
        else:
            least = least_build_memory(self._graphs, self.config.weights)
        require_build_memory(needed, least=least, available=self._machine.available, bound=bound)

    def _capabilities(self, config: BuildConfig) -> Capabilities:
        return chosen_capabilities(self._variant, self._bundle, config, self._machine)

    def _kernel_sms(self, config: BuildConfig) -> tuple[int, ...]:
        """Engines tried on a GPU they hold no code for still need kernels that have it."""
        sms = self._capabilities(config).sms or BUILDABLE_SMS
        if not (self._variant.sms and self._machine.rtx_any_sm):
            return sms
        here = {gpu.sm for gpu in self._machine.gpus}.intersection(BUILDABLE_SMS)
        return tuple(sorted({*sms, *here}))


def _steps(plans: Iterable[EnginePlan]) -> dict[str, tuple[Step, ...]]:
    """What runs, in order, by graph: engines, and the experts after them."""
    steps: dict[str, tuple[Step, ...]] = {}
    for plan in plans:
        after = () if plan.experts is None else (plan.experts,)
        steps[plan.graph] = (*steps.get(plan.graph, ()), plan.engine, *after)
    return steps
