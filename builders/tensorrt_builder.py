"""Engines of TensorRT and TensorRT for RTX from a bundle's graphs: the library is a value, the rest is the same."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from twotower.builders.base import DEFAULT_MAX_CONTEXT, BuildConfig, Report
from twotower.builders.cut import build_memory, cut_layers, most_weights
from twotower.builders.job import run_job
from twotower.builders.memory import require_build_memory
from twotower.builders.profiles import cache_capacity, profiles
from twotower.builders.segment import GraphLayers, Segment, fix_axes, layer_bytes, segment
from twotower.bundle import GRAPH_FILES, Bundle, EngineFile, EngineLimits, EngineRecord, FileRecord, hash_file
from twotower.errors import BuildError
from twotower.flavour import Flavour
from twotower.graph_files import load_graph
from twotower.hardware import probe_machine
from twotower.spec import CONTEXT_HEAD

__all__ = ["DEFAULT_SMS", "TensorRTBuilder"]

DEFAULT_SMS = (86, 89, 120)
"""Ahead of time and without a GPU to ask: GeForce RTX 30, 40 and 50 and the professional cards of those generations."""

_HALF_ONLY = (75,)  # compute capabilities for which products in float32 and bfloat16 are refused


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
        limits = record.limits
        if limits != self._limits(bundle, config):
            return False
        cut = {name: [e.layers for e in parts] for name, parts in record.engines.items()}
        wanted: dict[str, list[tuple[int, int]]] = {}
        for piece in self._pieces(bundle, config):
            wanted.setdefault(piece.graph, []).append(piece.layers)
        return cut == wanted

    def describe(self, bundle: Bundle, config: BuildConfig) -> list[str]:
        limits, weights = self._limits(bundle, config), self._weights(bundle)
        for_what = ", ".join(f"SM {sm}" for sm in limits.sms) or "the GPU at hand"
        lines = [
            f"for         {for_what}; {bundle.dtype}; up to {limits.max_batch} rows, {limits.capacity} positions of keys and values",
        ]
        for piece in self._pieces(bundle, config):
            size = _between(weights[piece.graph], piece.layers)
            shapes = ", ".join(p.name for p in profiles(piece.graph, max_batch=limits.max_batch, block_size=bundle.trained_block_size))
            lines.append(
                f"{piece.file:<22}{size / 1e9:.3g} GB of weights, about {build_memory(size) / 1e9:.2g} GB to build; profiles {shapes}"
            )
        return lines

    def needed_bytes(self, bundle: Bundle, config: BuildConfig) -> int:
        self._limits(bundle, config)  # what cannot be built is said before space is asked for
        return sum(w.total for w in self._weights(bundle).values()) * 101 // 100 + (64 << 20)

    def build(self, bundle: Bundle, folder: Path, config: BuildConfig, *, report: Report) -> EngineRecord:
        started, limits = time.perf_counter(), self._limits(bundle, config)
        require_build_memory(self._weights(bundle), available=probe_machine().available, bound=config.max_build_memory)
        engines: dict[str, tuple[EngineFile, ...]] = {}
        facts: dict[str, Any] = {}
        for piece in self._pieces(bundle, config):
            made = self._segment(bundle, piece, limits)
            shapes = profiles(piece.graph, max_batch=limits.max_batch, block_size=bundle.trained_block_size)
            engine = EngineFile(piece.file, made.layers, made.inputs, made.outputs, shapes)
            job = self._job(bundle, piece, engine, limits)
            facts[piece.file] = self._run(made, job, folder, report)
            engines[piece.graph] = (*engines.get(piece.graph, ()), engine)
        return EngineRecord(
            target=self.flavour.target,
            library=self.library(),
            dtype=bundle.dtype,
            graphs={name: bundle.graph_identity(name) for name in GRAPH_FILES},
            weights={},
            files={p.name: FileRecord(p.stat().st_size, hash_file(p)) for p in sorted(folder.iterdir())},
            report={"seconds": round(time.perf_counter() - started, 2), "engines": facts},
            limits=limits,
            engines=engines,
        )

    def _run(self, made: Segment, job: dict[str, Any], folder: Path, report: Report) -> dict[str, Any]:
        """Builds one piece into `folder` in a child process."""
        scratch = folder / "scratch"
        scratch.mkdir()
        job = {**job, "graph": str(scratch / "graph.onnx"), "output": str(folder / job["file"])}
        (scratch / "graph.onnx").write_bytes(made.model.SerializeToString())
        try:
            return run_job(job, scratch, tick=lambda phase, step, steps: report(f"{job['file']}: {phase}", step, steps))
        finally:
            for file in scratch.iterdir():
                file.unlink()
            scratch.rmdir()

    def _job(self, bundle: Bundle, piece: _Piece, engine: EngineFile, limits: EngineLimits) -> dict[str, Any]:
        cache = None if self.flavour.sms else str(bundle.path / "engines" / f".{self.flavour.target}.timing")
        described = engine.to_json()
        return {
            "target": self.flavour.target,
            "file": engine.file,
            "beside": str(bundle.graph_file(piece.graph)),
            "inputs": described["inputs"],
            "profiles": described["profiles"],
            "sms": list(limits.sms) if self.flavour.sms else [],
            "dtype": bundle.dtype,
            "timing_cache": cache,
        }

    def _segment(self, bundle: Bundle, piece: _Piece, limits: EngineLimits) -> Segment:
        model = load_graph(bundle.graph_file(piece.graph))
        sizes = {"T": limits.capacity, "S": bundle.trained_block_size}
        fix_axes(model, sizes)
        signature = bundle.signatures[piece.graph].with_sizes(sizes)
        if piece.graph == CONTEXT_HEAD:
            return Segment(model, piece.layers, signature.inputs, signature.outputs)
        return segment(model, signature, piece.layers, dtype=bundle.dtype)

    def _pieces(self, bundle: Bundle, config: BuildConfig) -> list[_Piece]:
        """Every engine of the build, in order: a graph is one unless the memory bound makes it several."""
        out = []
        for name, weights in self._weights(bundle).items():
            cuts = _cuts(weights, config.max_build_memory)
            for number, layers in enumerate(cuts):
                file = f"{name}.engine" if len(cuts) == 1 else f"{name}.{number}.engine"
                out.append(_Piece(name, layers, file))
        return out

    def _weights(self, bundle: Bundle) -> dict[str, GraphLayers]:
        return {name: layer_bytes(_structure(bundle, name)) for name in GRAPH_FILES}

    def _limits(self, bundle: Bundle, config: BuildConfig) -> EngineLimits:
        longest = bundle.config.max_position_embeddings
        capacity = cache_capacity(config.max_context or min(DEFAULT_MAX_CONTEXT, longest), longest)
        return EngineLimits(capacity, config.max_batch, self._sms(bundle, config))

    def _sms(self, bundle: Bundle, config: BuildConfig) -> tuple[int, ...]:
        name, version, listed = self.flavour.module.__name__, self.flavour.version, self.flavour.sms
        present = tuple(sorted({gpu.sm for gpu in probe_machine().gpus}))
        if not listed:
            if config.sms or not present:
                found = "--sm was given" if config.sms else "there is no NVIDIA GPU here"
                do = "build on the machine that will run it, or use `--target rtx`, which builds ahead of time for RTX GPUs"
                raise BuildError(f"{name} {version} builds for the GPU at hand only", found=found, do=do)
            return present
        chosen = tuple(sorted(set(config.sms))) or tuple(sm for sm in present if sm in listed) or DEFAULT_SMS
        unknown = [sm for sm in chosen if sm not in listed]
        narrow = [sm for sm in chosen if sm in _HALF_ONLY] if bundle.dtype != "float16" else []
        if unknown:
            found = f"supported: {', '.join(map(str, listed))}"
            raise BuildError(f"{name} {version} does not build for SM {', '.join(map(str, unknown))}", found=found, do=_OTHER)
        if narrow:
            found = f"supported in {bundle.dtype}: {', '.join(str(sm) for sm in listed if sm not in _HALF_ONLY)}"
            do = "export with --dtype float16, or leave it out of --sm"
            raise BuildError(f"SM {narrow[0]} has no products in {bundle.dtype}", found=found, do=do)
        return chosen


_OTHER = "choose others with --sm; for Hopper and data-centre Blackwell use `--target trt` or `--target ort-cuda`"


def _structure(bundle: Bundle, name: str) -> onnx.ModelProto:
    return load_graph(bundle.graph_file(name))


def _cuts(weights: GraphLayers, memory: int | None) -> tuple[tuple[int, int], ...]:
    if memory is None or not weights.layers:
        return ((0, len(weights.layers)),)
    return cut_layers(weights.layers, first_extra=weights.before, last_extra=weights.after, most=most_weights(memory))


def _between(weights: GraphLayers, layers: tuple[int, int]) -> int:
    """Weight bytes of the layers [first, end), with what comes before and after them."""
    first, end = layers
    ends = (weights.before if first == 0 else 0) + (weights.after if end == len(weights.layers) else 0)
    return sum(weights.layers[first:end]) + ends
