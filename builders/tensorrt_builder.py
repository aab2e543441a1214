"""Engines of TensorRT and TensorRT for RTX from a bundle's graphs: the library is a value, the rest is the same."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import DEFAULT_MAX_CONTEXT, BuildConfig, Report
from twotower.builders.build_cost import LayerBytes
from twotower.builders.cache_keys import GpuIdentity
from twotower.builders.cache_store import open_cache
from twotower.builders.capabilities import Capabilities, chosen_capabilities
from twotower.builders.cut import least_bound, tower_cuts
from twotower.builders.engine_plan import EnginePlan, plan_key
from twotower.builders.expanded import expands_experts, require_fused
from twotower.builders.float32_sums import sum_float32_products
from twotower.builders.make_engine import EngineMaker
from twotower.builders.memory import require_build_memory
from twotower.builders.profiles import cache_capacity, profiles
from twotower.builders.segment import Segment, fix_axes, layer_bytes, segment
from twotower.builders.weight_inputs import WeightPlaces, place_weights
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineFile, EngineLimits, EngineRecord, FileRecord
from twotower.errors import BuildError
from twotower.flavour import Flavour
from twotower.graph_files import load_graph
from twotower.graph_lint import require_clean
from twotower.hardware import probe_machine, untried
from twotower.spec import CONTEXT_HEAD

__all__ = ["TensorRTBuilder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One engine to be built: which graph, which layers, and its file's name."""

    graph: str
    layers: tuple[int, int]
    file: str


class TensorRTBuilder:
    """Builds the targets `rtx` and `trt`.

    Args:
        flavour: The library.
    """

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour

    def library(self) -> dict[str, str]:
        return self.flavour.library

    def fits(self, record: EngineRecord, bundle: Bundle, config: BuildConfig) -> bool:
        if record.limits != self._limits(bundle, config):
            return False
        if expands_experts(record) and not config.allow_expanded:
            return False
        made = {e.file: (e.layers, set(e.constants)) for parts in record.engines.values() for e in parts}
        wanted = {plan.engine.file: (plan.engine.layers, set(plan.engine.constants)) for plan in self._plans(bundle, config)}
        return made == wanted and (not self.flavour.sms or self._same_keys(record, bundle, config))

    def _same_keys(self, record: EngineRecord, bundle: Bundle, config: BuildConfig) -> bool:
        """Whether a build would make just these engines: another version of twotower may cut or configure differently.

        Not asked of an engine for the GPU at hand: its key holds the driver, and an engine outlives a driver.
        """
        observed = record.report.get("engines", {})
        return all(observed.get(plan.engine.file, {}).get("key") == plan.key for plan in self._plans(bundle, config))

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        limits = self._limits(bundle, config)
        for_what = ", ".join(f"SM {sm}" for sm in limits.sms) or "the library's own set of GPUs"
        lines = [
            f"for         {for_what}; {bundle.dtype}; up to {limits.max_batch} rows, {limits.capacity} positions of keys and values",
        ]
        cache = open_cache(bundle, config)
        for plan in self._plans(bundle, config):
            shapes = ", ".join(p.name for p in plan.engine.profiles)
            first, end = plan.engine.layers
            cached = cache is not None and not config.force and cache.find(plan.key) is not None
            lines.append(
                f"{plan.engine.file:<22}"
                + (f"layers {first} to {end - 1}; " if end > first else "")
                + _described(plan.places)
                + ("in the cache" if cached else f"about {_gigabytes(plan.build_memory)} of memory to build")
                + f"; profiles {shapes}"
            )
        return lines

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        self._limits(bundle, config)  # what cannot be built is said before space is asked for
        cache = open_cache(bundle, config)
        shared = cache is not None and not config.force and config.cache is None and cache.folder.is_dir()
        new = [p for p in self._plans(bundle, config) if not (shared and cache is not None and cache.find(p.key))]
        return sum(p.nbytes for p in new)

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        started, limits = time.perf_counter(), self._limits(bundle, config)
        cache = open_cache(bundle, config)
        if cache is not None:
            cache.prepare()
        machine = probe_machine()
        if machine.rtx_any_sm and self.flavour.sms:
            logger.warning("%s", untried(machine.rtx_any_sm, [gpu.sm for gpu in machine.gpus]))
        maker = EngineMaker(bundle, folder, cache, force=config.force, report=report)
        engines: dict[str, tuple[EngineFile, ...]] = {}
        files: dict[str, FileRecord] = {}
        facts: dict[str, Any] = {}
        plans = list(self._plans(bundle, config))  # all graphs are checked before the first is built
        require_build_memory(
            {p.engine.file: p.build_memory for p in plans if cache is None or config.force or cache.find(p.key) is None},
            least=max(least_bound(_held(bundle, name, config.weights)) for name in GRAPH_FILES),
            available=machine.available,
            bound=config.max_build_memory,
        )
        for plan in plans:
            files[plan.engine.file], made = maker.make(plan)
            if not config.allow_expanded:
                require_fused(plan.engine, made, readable=bool(self.flavour.sms))
            facts[plan.engine.file] = {**made, "weights": plan.places.to_json(), "notes": list(plan.notes), "operators": plan.operators}
            engines[plan.graph] = (*engines.get(plan.graph, ()), plan.engine)
        return EngineRecord(
            target=self.flavour.target,
            library=self.library(),
            dtype=bundle.dtype,
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            weights={name: GRAPH_FILES[name] + DATA_SUFFIX for name in GRAPH_FILES},
            holds={name: bundle.data_identity(name) for name, parts in engines.items() if any(e.constants for e in parts)},
            files=files,
            report={"seconds": round(time.perf_counter() - started, 2), "engines": facts},
            limits=limits,
            engines=engines,
        )

    def _plans(self, bundle: Bundle, config: BuildConfig) -> Iterator[EnginePlan]:
        """Every engine of the build, in order, one at a time: the graph of a tower is some megabytes."""
        limits, chosen = self._limits(bundle, config), self._capabilities(bundle, config)
        gpu = self._gpu() if chosen.current or not self.flavour.sms else None
        for piece in self._pieces(bundle, config):
            made = self._segment(bundle, piece, limits)
            if chosen.half_only:
                sum_float32_products(made.model)
            notes, operators = _notes(made.model, piece), Counter(node.op_type for node in made.model.graph.node)
            places = place_weights(made.model, config.weights)
            if places.inside:
                bundle.require_weights(f"an engine that holds weights ({piece.file})")
            shapes = profiles(piece.graph, max_batch=limits.max_batch, block_size=bundle.trained_block_size)
            engine = EngineFile(piece.file, made.layers, made.inputs, made.outputs, shapes, places.inputs, tuple(places.inside))
            job, model = self._job(bundle, engine, chosen), made.model.SerializeToString()
            holds = bundle.data_identity(piece.graph) if places.inside else ""
            yield EnginePlan(
                graph=piece.graph,
                engine=engine,
                model=model,
                beside=bundle.graph_file(piece.graph),
                places=places,
                key=plan_key(job, model, holds=holds, library=self.library(), gpu=gpu),
                job=job,
                notes=notes,
                operators=dict(operators.most_common()),
            )

    def _job(self, bundle: Bundle, engine: EngineFile, chosen: Capabilities) -> dict[str, Any]:
        timings = None if self.flavour.sms else str(bundle.path / "engines" / f".{self.flavour.target}.timing")
        described = engine.to_json()
        return {
            "target": self.flavour.target,
            "inputs": described["inputs"],
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

    def _segment(self, bundle: Bundle, piece: _Piece, limits: EngineLimits) -> Segment:
        model = load_graph(bundle.graph_file(piece.graph))
        sizes = {"T": limits.capacity, "S": bundle.trained_block_size}
        fix_axes(model, sizes)
        signature = bundle.signatures[piece.graph].with_sizes(sizes)
        if piece.graph == CONTEXT_HEAD:
            return Segment(model, piece.layers, signature.inputs, signature.outputs)
        return segment(model, signature, piece.layers, dtype=bundle.dtype)

    def _pieces(self, bundle: Bundle, config: BuildConfig) -> list[_Piece]:
        """Every engine of the build, in order: a graph is one unless it is cut for several devices or by the memory bound."""
        out = []
        for name in GRAPH_FILES:
            cuts = _cuts(bundle, name, config)
            for number, layers in enumerate(cuts):
                file = f"{name}.engine" if len(cuts) == 1 else f"{name}.{number}.engine"
                out.append(_Piece(name, layers, file))
        return out

    def _limits(self, bundle: Bundle, config: BuildConfig) -> EngineLimits:
        longest = bundle.config.max_position_embeddings
        capacity = cache_capacity(config.max_context or min(DEFAULT_MAX_CONTEXT, longest), longest)
        return EngineLimits(capacity, config.max_batch, self._sms(bundle, config))

    def _sms(self, bundle: Bundle, config: BuildConfig) -> tuple[int, ...]:
        return self._capabilities(bundle, config).sms

    def _capabilities(self, bundle: Bundle, config: BuildConfig) -> Capabilities:
        return chosen_capabilities(self.flavour, bundle, config, probe_machine())


def _notes(model: onnx.ModelProto, piece: _Piece) -> tuple[dict[str, str], ...]:
    """What the very graph TensorRT is given costs there; an error in it refuses the build."""
    do = "export the checkpoint again with this version of twotower (docs/graph-rules.md explains each rule)"
    return tuple(n.to_json() for n in require_clean(model, f"the graph of {piece.file}", error=BuildError, do=do, fixed=True))


def _held(bundle: Bundle, name: str, weights: str) -> LayerBytes:
    """Of a graph's weights those that its engines will hold."""
    model = load_graph(bundle.graph_file(name))
    place_weights(model, weights)
    return layer_bytes(model)


def _cuts(bundle: Bundle, name: str, config: BuildConfig) -> tuple[tuple[int, int], ...]:
    """Groups of layers, each an engine."""
    whole = layer_bytes(load_graph(bundle.graph_file(name)))
    held = _held(bundle, name, config.weights)
    return tower_cuts(whole.layers, held, segments=config.segments, bound=config.max_build_memory)


def _described(places: WeightPlaces) -> str:
    parts = [f"{_gigabytes(places.input_bytes)} of weights as inputs"] if places.inputs else []
    parts += [f"{_gigabytes(places.inside_bytes)} inside"] if places.inside else []
    return "".join(f"{part}, " for part in parts)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**8 else f"{count / 1e6:.1f} MB"
