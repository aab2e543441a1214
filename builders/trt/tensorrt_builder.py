"""Engines of TensorRT and TensorRT for RTX from a bundle's graphs: the library is a value, the rest is the same."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import AUTO, DEFAULT_MAX_CONTEXT, KERNELS, BuildConfig, Report
from twotower.builders.build_cost import require_bound, require_build_memory
from twotower.builders.cache_keys import GpuIdentity
from twotower.builders.cache_store import open_cache
from twotower.builders.expert_choice import (
    DENSE_COST,
    ExpertChoice,
    choose_experts,
    require_compiler,
)
from twotower.builders.expert_code import Compile, compile_code, kernel_source, require_kernels
from twotower.builders.expert_cut import common_form
from twotower.builders.profiles import cache_capacity, profiles
from twotower.builders.trt.capabilities import Capabilities, chosen_capabilities
from twotower.builders.trt.engine_inspector import expands_experts, require_fused
from twotower.builders.trt.engine_plan import EnginePlan, plan_key
from twotower.builders.trt.make_engine import EngineMaker
from twotower.builders.trt.pieces import Piece, least_build_memory, pieces_of, sum_float32_products
from twotower.builders.weight_inputs import WeightPlaces, place_weights
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineFile, EngineLimits, EngineRecord, FileRecord, Step
from twotower.errors import BuildError
from twotower.graph_lint import require_clean
from twotower.hardware import probe_machine, untried
from twotower.kernels.compile import compile_kernels
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.spec import MAX_CHUNK
from twotower.tensorrt_library import Flavour

__all__ = ["TensorRTBuilder"]

logger = logging.getLogger(__name__)


class TensorRTBuilder:
    """Builds the targets `rtx` and `trt`.

    Args:
        flavour: The library.
        compiler: What compiles the kernels of experts; None for Triton, which may be missing.
    """

    def __init__(self, flavour: Flavour, compiler: Compile | None = None) -> None:
        self.flavour, self._compiler = flavour, compiler

    def library(self) -> dict[str, str]:
        return self.flavour.library

    def fits(self, record: EngineRecord, bundle: Bundle, config: BuildConfig) -> bool:
        config, choice = self._chosen(bundle, config)
        if record.report.get("choice_of_experts") != choice.to_json():
            return False
        if record.limits != self._limits(bundle, config):
            return False
        if expands_experts(record) and not config.allow_expanded:
            return False
        plans = list(self._plans(bundle, config))
        made = [(e.file, e.layers, set(e.constants)) for parts in record.engines.values() for e in parts]
        wanted = [(plan.engine.file, plan.engine.layers, set(plan.engine.constants)) for plan in plans]
        experts = [step for steps in record.experts.values() for step in steps]
        if made != wanted or experts != [plan.experts for plan in plans if plan.experts is not None]:
            return False
        code = {"source": kernel_source(), "sms": list(self._kernel_sms(bundle, config))}
        if any(about | code != about for about in record.report.get("experts", {}).values()):
            return False
        return not self.flavour.sms or _same_keys(record, plans)

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        config, choice = self._chosen(bundle, config)
        limits = self._limits(bundle, config)
        for_what = ", ".join(f"SM {sm}" for sm in limits.sms) or "the library's own set of GPUs"
        lines = [
            f"for         {for_what}; {bundle.dtype}; up to {limits.max_batch} rows, {limits.capacity} positions of keys and values",
        ]
        cache = open_cache(bundle, config)
        plans = list(self._plans(bundle, config))
        uses = Counter(plan.engine.file for plan in plans)
        for plan in _distinct(plans):
            shapes = ", ".join(p.name for p in plan.engine.profiles)
            first, end = plan.engine.layers
            count = uses[plan.engine.file]
            cached = cache is not None and not config.force and cache.find(plan.key) is not None
            lines.append(
                f"{plan.engine.file:<22}"
                + (f"{count} programs; " if count > 1 else f"layers {first} to {end - 1}; " if end > first else "")
                + _described(plan.places)
                + ("in the cache" if cached else f"about {_gigabytes(plan.build_memory)} of memory to build")
                + f"; profiles {shapes}"
            )
        if experts := sum(plan.experts is not None for plan in plans):
            sms = ", ".join(map(str, self._kernel_sms(bundle, config)))
            self._require_compiler()
            lines.append(f"{'experts':<22}{experts} layers of experts between programs; kernels for SM {sms}")
        if choice.why:
            lines.append(f"{'experts':<22}dense: {choice.why}; {DENSE_COST}")
        return lines

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        config, _ = self._chosen(bundle, config)
        self._limits(bundle, config)  # what cannot be built is said before space is asked for
        cache = open_cache(bundle, config)
        shared = cache is not None and not config.force and config.cache is None and cache.folder.is_dir()
        plans = list(self._plans(bundle, config))
        if any(plan.experts is not None for plan in plans):
            self._require_compiler()
        found = cache.find if shared and cache is not None else lambda key: None
        return sum(plan.nbytes for plan in _distinct(plans) if not found(plan.key))

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        started = time.perf_counter()
        config, choice = self._chosen(bundle, config)
        limits = self._limits(bundle, config)
        cache = open_cache(bundle, config)
        if cache is not None:
            cache.prepare()
        machine = probe_machine()
        if machine.rtx_any_sm and self.flavour.sms:
            logger.warning("%s", untried(machine.rtx_any_sm, [gpu.sm for gpu in machine.gpus]))
        maker = EngineMaker(bundle, folder, cache, force=config.force, report=report)
        steps: dict[str, tuple[Step, ...]] = {}
        files: dict[str, FileRecord] = {}
        facts: dict[str, Any] = {}
        plans = list(self._plans(bundle, config))  # all graphs are checked before the first is built
        needed = {p.engine.file: p.build_memory for p in plans if cache is None or config.force or cache.find(p.key) is None}
        if config.experts == KERNELS:
            require_bound(needed, config.max_build_memory)
        require_build_memory(
            needed,
            least=max(p.build_memory for p in plans) if config.experts == KERNELS else least_build_memory(bundle, config.weights),
            available=machine.available,
            bound=config.max_build_memory,
        )
        experts = [plan.experts for plan in plans if plan.experts is not None]
        code, about_code = compile_code(
            experts,
            self._kernel_sms(bundle, config),
            folder,
            max_tokens=limits.max_batch * MAX_CHUNK,
            compiler=self._compiler or compile_kernels,
            report=report,
        )
        for plan in _distinct(plans):
            files[plan.engine.file], made = maker.make(plan)
            if not config.allow_expanded:
                require_fused(plan.engine, made, readable=bool(self.flavour.sms))
            facts[plan.engine.file] = {**made, "weights": plan.places.to_json(), "notes": list(plan.notes), "operators": plan.operators}
        for plan in plans:
            after = () if plan.experts is None else (plan.experts,)
            steps[plan.graph] = (*steps.get(plan.graph, ()), plan.engine, *after)
        return EngineRecord(
            target=self.flavour.target,
            library=self.library(),
            dtype=bundle.dtype,
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            weights={name: GRAPH_FILES[name] + DATA_SUFFIX for name in GRAPH_FILES},
            holds={name: bundle.data_identity(name) for name in GRAPH_FILES if any(p.engine.constants for p in plans if p.graph == name)},
            files=files | code,
            report={
                "seconds": round(time.perf_counter() - started, 2),
                "engines": facts,
                "experts": about_code,
                "choice_of_experts": choice.to_json(),
            },
            limits=limits,
            steps=steps,
        )

    def _chosen(self, bundle: Bundle, config: BuildConfig) -> tuple[BuildConfig, ExpertChoice]:
        """The options with what computes experts decided, and why."""
        sms: tuple[int, ...] = ()
        if config.experts == AUTO:
            sms = self._kernel_sms(bundle, replace(config, experts=KERNELS, segments=1))
        choice = choose_experts(bundle, config, sms)
        return replace(config, experts=choice.experts), choice

    def _require_compiler(self) -> None:
        if self._compiler is None:
            require_compiler()

    def _plans(self, bundle: Bundle, config: BuildConfig) -> Iterator[EnginePlan]:
        """Every engine of the build, in the order they run. Equal programs of a tower have one file."""
        limits, chosen = self._limits(bundle, config), self._capabilities(bundle, config)
        gpu = self._gpu() if chosen.current or not self.flavour.sms else None
        files: dict[str, dict[str, str]] = {name: {} for name in GRAPH_FILES}
        sms = self._kernel_sms(bundle, config)
        for piece in pieces_of(bundle, config, {"T": limits.capacity, "S": bundle.trained_block_size}):
            if piece.experts is not None:
                require_kernels(piece.experts, sms, max_tokens=limits.max_batch * MAX_CHUNK)
            made = piece.segment
            if chosen.half_only:
                sum_float32_products(made.model)
            notes, operators = _notes(made.model, piece), Counter(node.op_type for node in made.model.graph.node)
            places = place_weights(made.model, config.weights)
            if places.inside:
                bundle.require_weights(f"an engine that holds weights ({piece.name or piece.graph})")
            model, names = made.model, dict[str, str]()
            if piece.shared_from is not None:
                model, names = common_form(made.model, piece.shared_from)
            shapes = profiles(piece.graph, max_batch=limits.max_batch, block_size=bundle.trained_block_size)
            constants = tuple(places.inside)
            engine = EngineFile(piece.name, made.layers, made.inputs, made.outputs, shapes, places.inputs, constants, names)
            job, data = self._job(bundle, engine, chosen), model.SerializeToString()
            holds = bundle.data_identity(piece.graph) if places.inside else ""
            key = plan_key(job, data, holds=holds, library=self.library(), gpu=gpu)
            known = files[piece.graph]
            yield EnginePlan(
                graph=piece.graph,
                engine=replace(engine, file=known.setdefault(key, piece.name or f"{piece.graph}.{len(known)}.engine")),
                model=data,
                beside=bundle.graph_file(piece.graph),
                places=places,
                key=key,
                job=job,
                notes=notes,
                operators=dict(operators.most_common()),
                experts=piece.experts,
            )

    def _job(self, bundle: Bundle, engine: EngineFile, chosen: Capabilities) -> dict[str, Any]:
        timings = None if self.flavour.sms else str(bundle.path / "engines" / f".{self.flavour.target}.timing")
        described = engine.to_json()
        return {
            "target": self.flavour.target,
            "inputs": [[engine.own(name), dtype, axes] for name, dtype, axes in described["inputs"]],
            "profiles": described["profiles"],
            "sms": list(chosen.named),
            "current": chosen.current,
            "dtype": bundle.dtype,
            "timing_cache": timings,
        }

    def _gpu(self) -> GpuIdentity | None:
        """The GPU a library that builds for the one at hand builds for: the driver's first."""
        machine = probe_machine()
        return next((GpuIdentity(name=gpu.name, sm=gpu.sm, driver=machine.driver) for gpu in machine.gpus), None)

    def _kernel_sms(self, bundle: Bundle, config: BuildConfig) -> tuple[int, ...]:
        """Those that kernels are compiled for: the engines', or all where the library chooses.

        Where engines are tried on GPUs they hold no code for, kernels have to have it all the same.
        """
        sms, machine = self._sms(bundle, config) or BUILDABLE_SMS, probe_machine()
        if not (self.flavour.sms and machine.rtx_any_sm):
            return sms
        return tuple(sorted({*sms, *(gpu.sm for gpu in machine.gpus if gpu.sm in BUILDABLE_SMS)}))

    def _limits(self, bundle: Bundle, config: BuildConfig) -> EngineLimits:
        longest = bundle.config.max_position_embeddings
        capacity = cache_capacity(config.max_context or min(DEFAULT_MAX_CONTEXT, longest), longest)
        return EngineLimits(capacity, config.max_batch, self._sms(bundle, config))

    def _sms(self, bundle: Bundle, config: BuildConfig) -> tuple[int, ...]:
        return self._capabilities(bundle, config).sms

    def _capabilities(self, bundle: Bundle, config: BuildConfig) -> Capabilities:
        return chosen_capabilities(self.flavour, bundle, config, probe_machine())


def _same_keys(record: EngineRecord, plans: Iterable[EnginePlan]) -> bool:
    """Whether a build would make just these engines: another version of twotower may cut or configure differently.

    Not asked of an engine for the GPU at hand: its key holds the driver, and an engine outlives a driver.
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
    return tuple(n.to_json() for n in require_clean(model, what, error=BuildError, do=do, fixed=True))


def _described(places: WeightPlaces) -> str:
    parts = [f"{_gigabytes(places.input_bytes)} of weights as inputs"] if places.inputs else []
    parts += [f"{_gigabytes(places.inside_bytes)} inside"] if places.inside else []
    return "".join(f"{part}, " for part in parts)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
