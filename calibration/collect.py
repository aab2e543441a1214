"""Activation statistics from real denoising: the shipped loop on watched engines, resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from twotower.builders import build_engines, builder_for
from twotower.builders.base import Report, silent
from twotower.bundle import GRAPH_FILES, Bundle, engine_folder, unpublished, write_json
from twotower.calibration.activation_statistics import (
    CONTEXT_BUCKETS,
    DENOISER_BUCKETS,
    Statistics,
    TowerStatistics,
    bucket_of,
    identity_of,
    read_statistics,
    write_statistics,
)
from twotower.calibration.quantization_plan import require_float
from twotower.calibration.recipes import quantizable_weights
from twotower.calibration.watched_engine import (
    Seen,
    Watch,
    WatchedEngine,
    engine_places,
    plain_engine,
    write_engine,
)
from twotower.config import GenerationConfig, LayerKind, ModelConfig
from twotower.errors import CalibrationError
from twotower.export.graph_files import point_to_data
from twotower.export.graphs.tower_graphs import build_graph
from twotower.runtime import Request, TwoTower
from twotower.runtime.engines.towers import Towers
from twotower.runtime.tokenizer import Tokenizer
from twotower.spec import (
    BLOCK,
    CHUNK_LENGTH,
    CONFIDENCE,
    CONTEXT,
    CONTEXT_HEAD,
    DENOISER,
    MASKED_LEFT,
    MAX_CHUNK,
    PREDICTED,
    signatures,
)
from twotower.weights.declared import lay_out

Array = npt.NDArray[Any]
_TARGET = "ort-cpu"
_KEEP_EVERY_SECONDS = 20.0
_WATCHED_BYTES = 1 << 30


def collect(
    bundle: Bundle,
    requests: Sequence[Request],
    output: Path,
    generation: GenerationConfig,
    *,
    draw: Callable[[Statistics], Mapping[str, bytes]] | None = None,
    report: Report | None = None,
) -> Statistics:
    """Gathers statistics of a float bundle into a new folder.

    The bundle's `ort-cpu` engine is built if it is not there. What was gathered is kept beside the
    folder from time to time; the same prompts and options go on from there with the same result,
    number for number. `generation` serves prompts without options of their own; one without a seed
    takes seed 0, so that a run that goes on draws the same. `draw` makes pictures (file name ->
    content); `report` is called with (what, prompts done, prompts in all).

    Raises:
        CalibrationError: the folder exists, no prompts, or an activation that is not finite.
        BundleError: the bundle is quantized.
        RequestError: a prompt cannot be served.
    """
    require_float(bundle)
    if output.exists() or output.is_symlink():
        raise CalibrationError(
            f"the output folder '{output}' exists already",
            found="statistics are never overwritten",
            do="name a new folder with -o",
        )
    if not requests:
        raise CalibrationError(
            "there is nothing to calibrate on", found="no prompts", do="name a file with prompts"
        )
    tell = report or silent
    build_engines(bundle, _TARGET, builder_for(_TARGET), report=tell)
    key = _key(bundle, requests, generation)
    kept = output.absolute().parent / f".{output.name}.{key[:12]}.unfinished"
    graphs = {name: _WatchedGraph(bundle, name) for name in (CONTEXT, DENOISER)}
    run = _Gathered(kept, key, identity_of(bundle), graphs)
    run.resume()
    with (
        tempfile.TemporaryDirectory(prefix="twotower-calibrate-") as scratch,
        _opened(bundle, graphs, run, Path(scratch)) as model,
    ):
        _gather(model, run, requests, generation, tell)
    facts = {
        "bundle": bundle.path.resolve().name,
        "dtype": bundle.dtype,
        "key": key,
        "prompts": len(requests),
        "passes": run.passes,
        "blocks": run.blocks,
        "tokens": run.tokens,
        "generation": generation.seeded().to_json(),
    }
    statistics = Statistics(output, identity_of(bundle), run.towers, facts)
    try:
        with unpublished(output) as folder:
            write_statistics(statistics, folder)
            for name, content in (draw(statistics) if draw else {}).items():
                (folder / name).write_bytes(content)
    except OSError as e:
        raise CalibrationError(
            f"the statistics could not be written to '{output}'",
            found=str(e),
            do="free disk space or check permissions; run the same command again: "
            "it goes on where it was",
        ) from e
    shutil.rmtree(kept, ignore_errors=True)
    return read_statistics(output)


def watched_chunk(config: ModelConfig) -> int:
    """Most prompt tokens of a pass so that watched values, mostly hidden ones, stay below 1 GB."""
    hidden = config.n_routed_experts * config.moe_intermediate_size
    experts = hidden * len(config.indices(LayerKind.MOE))
    others = len(config.layers) * 2 * (config.hidden_size + config.mamba_inner)
    tokens = _WATCHED_BYTES // (4 * (experts + others))
    return max(16, min(tokens, MAX_CHUNK))


class _WatchedGraph:
    """A tower's graph, its taps (inputs of products), and the values needed to see them."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self._bundle, self._name = bundle, name
        self._graph = build_graph(name, bundle.config, "float32")
        known = {weight.name for weight in quantizable_weights(bundle.config, name)}
        self.taps = [tap for tap in self._graph.taps if tap.weight in known]
        values = [value for tap in self.taps for value in (tap.value, tap.visited) if value]
        self.watched = list(dict.fromkeys(values))

    def write(self, path: Path) -> None:
        """Writes an engine with the watched values as outputs, on the bundle's own weights."""
        graph = self._graph
        values = {value.name: value for node in graph.model.graph for value in node.outputs}
        for watched in self.watched:
            value = values[watched]
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.model.graph.outputs.append(value)
        point_to_data(graph.model, lay_out(graph.weights), "unused")
        places = engine_places(self._bundle, self._name)
        write_engine(
            ir.to_proto(graph.model),
            places,
            path,
            name=self._name,
        )


class _Gathered:
    """What one calibration has gathered so far, kept in the folder `kept` under the run's `key`.

    What a run with another key has kept is not taken up.
    """

    def __init__(
        self, kept: Path, key: str, source: str, graphs: Mapping[str, _WatchedGraph]
    ) -> None:
        self._kept, self._key, self._source = kept, key, source
        self._taps = {name: graph.taps for name, graph in graphs.items()}
        self.towers = {}
        for name, buckets in ((CONTEXT, CONTEXT_BUCKETS), (DENOISER, DENOISER_BUCKETS)):
            inputs = [tap.weight for tap in self._taps[name]]
            self.towers[name] = TowerStatistics.empty(inputs, buckets)
        self.done = self.passes = self.blocks = self.tokens = 0

    def add(
        self,
        tower: str,
        bucket: int,
        length: int,
        seen: Mapping[str, Array],
    ) -> None:
        """Takes in rows of real tokens: no padding, and for experts only their visitors."""
        for index, tap in enumerate(self._taps[tower]):
            values = seen[tap.value][..., :length, :]
            if tap.visited is not None:
                values = values[seen[tap.visited][:, :length, 0] > 0]
            self.towers[tower].add(index, bucket, values)

    def keep(self) -> None:
        """Writes it, whole or not at all."""
        partial = self._kept.with_name(f"{self._kept.name}.new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_statistics(Statistics(partial, self._source, self.towers), partial)
        counts = {name: getattr(self, name) for name in _COUNTS}
        write_json(partial / _PROGRESS_FILE, {"key": self._key, **counts})
        shutil.rmtree(self._kept, ignore_errors=True)
        partial.rename(self._kept)

    def resume(self) -> None:
        """Takes up what a run of the same key has kept, if all of it can be read."""
        try:
            progress = json.loads((self._kept / _PROGRESS_FILE).read_text(encoding="utf-8"))
            if progress["key"] == self._key:
                counts = {name: int(progress[name]) for name in _COUNTS}
                self.towers = dict(read_statistics(self._kept).towers)
                for name, count in counts.items():
                    setattr(self, name, count)
        except (OSError, ValueError, KeyError, TypeError, CalibrationError):
            return  # nothing was kept, or not all of it: from the start


_COUNTS = ("done", "passes", "blocks", "tokens")
_PROGRESS_FILE = "progress.json"


def _opened(
    bundle: Bundle, graphs: Mapping[str, _WatchedGraph], run: _Gathered, scratch: Path
) -> TwoTower:
    """A session on watched engines, one row at a time: memory is bounded, and a pass has one t."""
    contract = signatures(bundle.config, "float32")
    watches = {CONTEXT: _watch_context(run), DENOISER: _watch_denoiser(run, bundle)}
    engines = {}
    for name, graph in graphs.items():
        path = scratch / f"{name}.onnx"
        graph.write(path)
        watch = Watch(tuple(graph.watched), watches[name])
        engines[name] = WatchedEngine(path, bundle.path, contract[name], watch)
    file = engine_folder(bundle, _TARGET) / f"{CONTEXT_HEAD}.onnx"
    head = plain_engine(file, bundle.path, contract[CONTEXT_HEAD])
    return TwoTower.from_towers(
        Towers(bundle.config, "float32", engines[CONTEXT], head, engines[DENOISER]),
        tokenizer=Tokenizer.from_file(bundle.tokenizer_file) if bundle.tokenizer_file else None,
        trained_block_size=bundle.trained_block_size,
        defaults=bundle.defaults,
        max_batch=1,
        max_chunk=watched_chunk(bundle.config),
    )


def _watch_context(run: _Gathered) -> Seen:
    def saw_chunk(arrays: Mapping[str, Array], seen: Mapping[str, Array]) -> bool:
        run.add(CONTEXT, 0, int(arrays[CHUNK_LENGTH][0]), seen)
        return False

    return saw_chunk


def _watch_denoiser(run: _Gathered, bundle: Bundle) -> Seen:
    before: dict[str, Array] = {}

    def saw_step(arrays: Mapping[str, Array], seen: Mapping[str, Array]) -> bool:
        """Notes a step; a block that it finishes is run once more, without masks: clean text."""
        block = arrays[BLOCK]
        masked = int((block == bundle.config.mask_token_id).sum())
        run.add(
            DENOISER,
            bucket_of(masked, block.shape[1]),
            block.shape[1],
            seen,
        )
        if masked == 0:
            for name, value in before.items():
                np.copyto(arrays[name], value)
            return False
        if arrays[MASKED_LEFT].any():
            return False
        before.update({name: arrays[name].copy() for name in (BLOCK, PREDICTED, CONFIDENCE)})
        np.copyto(block, arrays["next_block"])
        return True

    return saw_step


def _gather(
    model: TwoTower,
    run: _Gathered,
    requests: Sequence[Request],
    generation: GenerationConfig,
    tell: Report,
) -> None:
    """Generates from every prompt that is not done yet; all are checked before the first."""
    wanted = []
    for request in requests:
        given = (request.config or generation).seeded()
        wanted.append(Request(request.prompt, replace(given, mode="diffusion")))
    model.stream(wanted).close()  # checks, and does no work
    kept_at = time.monotonic()
    try:
        while run.done < len(wanted):
            tell("calibrating", run.done, len(wanted))
            before = deepcopy(run.towers)
            try:
                result = model.generate(wanted[run.done])
            except BaseException:
                # Half a prompt would be counted twice by the run that goes on.
                run.towers.update(before)
                raise
            run.done += 1
            run.passes += result.usage.nfe
            run.blocks += result.usage.blocks
            run.tokens += len(result.tokens)
            if time.monotonic() - kept_at > _KEEP_EVERY_SECONDS:
                run.keep()
                kept_at = time.monotonic()
    except BaseException:
        if run.done:
            run.keep()
        raise
    tell("calibrating", run.done, len(wanted))


def _key(bundle: Bundle, requests: Sequence[Request], generation: GenerationConfig) -> str:
    """What must be the same for a run to go on with what another gathered."""
    prompts = []
    for request in requests:
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        prompts.append([prompt, request.config.to_json() if request.config else None])
    graphs = [bundle.graph_identity(name) for name in GRAPH_FILES]
    facts = {"graphs": graphs, "prompts": prompts, "generation": asdict(generation)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
