"""Ranges from real denoising: the shipped loop generates on engines that are watched, one prompt after the other, and can be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from twotower.builders import build_engines, builder_for
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
    WatchedEngine,
    engine_places,
    plain_engine,
    write_engine,
)
from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import CalibrationError
from twotower.export.graph_files import point_to_data
from twotower.export.graphs.precision import Tap
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

__all__ = ["CollectConfig", "collect", "watched_chunk"]

Array = npt.NDArray[Any]
Report = Callable[[str, int, int], None]
_TARGET = "ort-cpu"
_KEEP_EVERY_SECONDS = 20.0
_WATCHED_BYTES = 1 << 30
_KEPT_IN_PASS = (BLOCK, PREDICTED, CONFIDENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """Options of one calibration.

    Attributes:
        generation: Options of every prompt that has none of its own. A prompt without a seed takes
            seed 0: a run that goes on where another ended must draw the same.
    """

    generation: GenerationConfig


def collect(
    bundle: Bundle,
    requests: Sequence[Request],
    output: Path,
    config: CollectConfig,
    *,
    draw: Callable[[Statistics], Mapping[str, bytes]] | None = None,
    report: Report | None = None,
) -> Statistics:
    """Gathers statistics of a float bundle into a new folder.

    The bundle's `ort-cpu` engine is built if it is not there. What was gathered is kept beside the
    folder from time to time, and a run of the same prompts with the same options goes on from
    there: the result is the same, number for number.

    Args:
        bundle: The bundle.
        requests: The prompts.
        output: The folder to make.
        config: Options.
        draw: Makes pictures of the result: file name -> content.
        report: Called with (what, prompts done, prompts in all).

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
    tell = report or (lambda what, done, total: None)
    build_engines(bundle, _TARGET, builder_for(_TARGET), report=tell)
    key = _key(bundle, requests, config)
    kept = output.absolute().parent / f".{output.name}.{key[:12]}.unfinished"
    with tempfile.TemporaryDirectory(prefix="twotower-calibrate-") as scratch, ExitStack() as stack:
        run = _Run(bundle, Path(scratch), kept, key)
        model = stack.enter_context(run.opened())
        run.gather(model, requests, config, tell)
    statistics = Statistics(output, identity_of(bundle), run.towers, run.facts(config, requests))
    try:
        with unpublished(output) as folder:
            write_statistics(statistics, folder)
            for name, content in (draw(statistics) if draw else {}).items():
                (folder / name).write_bytes(content)
    except OSError as e:
        do = "free disk space or check permissions; run the same command again: it goes on where it was"
        raise CalibrationError(
            f"the statistics could not be written to '{output}'", found=str(e), do=do
        ) from e
    shutil.rmtree(kept, ignore_errors=True)
    return read_statistics(output)


def watched_chunk(config: ModelConfig) -> int:
    """Most prompt tokens of a pass so that what is watched stays below a gigabyte: hidden values of all experts are the bulk of it."""
    experts = (
        config.n_routed_experts
        * config.moe_intermediate_size
        * sum(kind.name == "MOE" for kind in config.layers)
    )
    others = len(config.layers) * 2 * (config.hidden_size + config.mamba_inner)
    return int(np.clip(_WATCHED_BYTES // (4 * (experts + others)), 16, MAX_CHUNK))


class _Run:
    """One calibration: its engines, what was gathered so far, and where that is kept."""

    def __init__(self, bundle: Bundle, scratch: Path, kept: Path, key: str) -> None:
        self._bundle, self._scratch, self._kept, self._key = bundle, scratch, kept, key
        self._graphs = {
            name: build_graph(name, bundle.config, "float32") for name in (CONTEXT, DENOISER)
        }
        self._taps = {name: self._of_products(name) for name in self._graphs}
        self.done = self._passes = self._blocks = self._tokens = 0
        self._before: dict[str, Array] = {}
        self.towers = {
            CONTEXT: TowerStatistics.empty(
                [t.weight for t in self._taps[CONTEXT]], CONTEXT_BUCKETS
            ),
            DENOISER: TowerStatistics.empty(
                [t.weight for t in self._taps[DENOISER]], DENOISER_BUCKETS
            ),
        }
        self._resume()

    def _of_products(self, name: str) -> list[Tap]:
        graph = self._graphs[name]
        known = {part.name for part in quantizable_weights(self._bundle.config, name)}
        return [tap for tap in graph.taps if tap.weight in known]

    def opened(self) -> TwoTower:
        """A session on watched engines, one row at a time: what is watched then belongs to one t, and memory is bounded."""
        bundle = self._bundle
        contract = signatures(bundle.config, "float32")
        context, denoiser = (
            WatchedEngine(
                self._engine(name),
                bundle.path,
                contract[name],
                watched=self._watched(name),
                watch=watch,
            )
            for name, watch in ((CONTEXT, self._saw_chunk), (DENOISER, self._saw_step))
        )
        head = plain_engine(
            engine_folder(bundle, _TARGET) / f"{CONTEXT_HEAD}.onnx",
            bundle.path,
            contract[CONTEXT_HEAD],
        )
        return TwoTower.from_towers(
            Towers(bundle.config, "float32", context, head, denoiser),
            tokenizer=Tokenizer.from_file(bundle.tokenizer_file) if bundle.tokenizer_file else None,
            trained_block_size=bundle.trained_block_size,
            defaults=bundle.defaults,
            max_batch=1,
            max_chunk=watched_chunk(bundle.config),
        )

    def gather(
        self, model: TwoTower, requests: Sequence[Request], config: CollectConfig, tell: Report
    ) -> None:
        """Generates from every prompt that is not done yet; all are checked before the first."""
        given = [(r.config or config.generation).seeded() for r in requests]
        options = [replace(g, mode="diffusion") for g in given]
        wanted = [Request(r.prompt, o) for r, o in zip(requests, options, strict=True)]
        model.stream(wanted).close()  # checks, and does no work
        kept_at = time.monotonic()
        try:
            while self.done < len(requests):
                tell("calibrating", self.done, len(requests))
                before = {name: _copy(s) for name, s in self.towers.items()}
                try:
                    result = model.generate(wanted[self.done])
                except BaseException:
                    self.towers.update(
                        before
                    )  # half a prompt would be counted twice by the run that goes on
                    raise
                self.done += 1
                self._passes, self._blocks = (
                    self._passes + result.usage.nfe,
                    self._blocks + result.usage.blocks,
                )
                self._tokens += len(result.tokens)
                if time.monotonic() - kept_at > _KEEP_EVERY_SECONDS:
                    self._keep()
                    kept_at = time.monotonic()
        except BaseException:
            if self.done:
                self._keep()
            raise
        tell("calibrating", self.done, len(requests))

    def facts(self, config: CollectConfig, requests: Sequence[Request]) -> dict[str, Any]:
        """How the statistics came about."""
        return {
            "bundle": self._bundle.path.resolve().name,
            "dtype": self._bundle.dtype,
            "key": self._key,
            "prompts": len(requests),
            "passes": self._passes,
            "blocks": self._blocks,
            "tokens": self._tokens,
            "generation": config.generation.seeded().to_json(),
        }

    def _watched(self, name: str) -> list[str]:
        return list(
            dict.fromkeys(
                value for tap in self._taps[name] for value in (tap.value, tap.visited) if value
            )
        )

    def _engine(self, name: str) -> Path:
        """The tower's graph with the watched values as outputs, on the weights of the bundle's own engine."""
        graph = self._graphs[name]
        values = {value.name: value for node in graph.model.graph for value in node.outputs}
        for watched in self._watched(name):
            value = values[watched]
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.model.graph.outputs.append(value)
        point_to_data(graph.model, lay_out(graph.weights), "unused")
        path = self._scratch / f"{name}.onnx"
        write_engine(ir.to_proto(graph.model), engine_places(self._bundle, name), path, name=name)
        return path

    def _saw_chunk(self, arrays: Mapping[str, Array], seen: Mapping[str, Array]) -> bool:
        self._add(CONTEXT, 0, int(arrays[CHUNK_LENGTH][0]), seen)
        return False

    def _saw_step(self, arrays: Mapping[str, Array], seen: Mapping[str, Array]) -> bool:
        """Notes a step; a block that is finished by it is run once more, without masks: what clean text looks like to this tower."""
        block = arrays[BLOCK]
        masked = int((block == self._bundle.config.mask_token_id).sum())
        self._add(DENOISER, bucket_of(masked, block.shape[1]), block.shape[1], seen)
        if masked == 0:
            for name in _KEPT_IN_PASS:
                np.copyto(arrays[name], self._before[name])
            return False
        if arrays[MASKED_LEFT].any():
            return False
        self._before = {name: arrays[name].copy() for name in _KEPT_IN_PASS}
        np.copyto(block, arrays["next_block"])
        return True

    def _add(self, tower: str, bucket: int, length: int, seen: Mapping[str, Array]) -> None:
        """Takes in the rows of real tokens: padding is left out, and of the experts' values those of tokens that did not visit them."""
        for index, tap in enumerate(self._taps[tower]):
            values = seen[tap.value][..., :length, :]
            if tap.visited is not None:
                values = values[seen[tap.visited][:, :length, 0] > 0]
            self.towers[tower].add(index, bucket, values)

    def _keep(self) -> None:
        """Writes what was gathered, whole or not at all."""
        partial = self._kept.with_name(f"{self._kept.name}.new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_statistics(Statistics(partial, identity_of(self._bundle), self.towers), partial)
        counts = {
            "done": self.done,
            "passes": self._passes,
            "blocks": self._blocks,
            "tokens": self._tokens,
        }
        write_json(partial / "progress.json", {"key": self._key, **counts})
        shutil.rmtree(self._kept, ignore_errors=True)
        partial.rename(self._kept)

    def _resume(self) -> None:
        try:
            progress = json.loads((self._kept / "progress.json").read_text(encoding="utf-8"))
            if progress["key"] != self._key:
                return
            self.towers = dict(read_statistics(self._kept).towers)
            self.done, self._passes = int(progress["done"]), int(progress["passes"])
            self._blocks, self._tokens = int(progress["blocks"]), int(progress["tokens"])
        except (OSError, ValueError, KeyError, TypeError, CalibrationError):
            return  # nothing was kept, or not all of it: from the start


def _copy(s: TowerStatistics) -> TowerStatistics:
    return TowerStatistics(
        s.names, s.buckets, s.histogram.copy(), s.minimum.copy(), s.maximum.copy(), s.squares.copy()
    )


def _key(bundle: Bundle, requests: Sequence[Request], config: CollectConfig) -> str:
    """What must be the same for a run to go on with what another gathered."""
    prompts = [
        [
            r.prompt if isinstance(r.prompt, str) else list(r.prompt),
            r.config.to_json() if r.config else None,
        ]
        for r in requests
    ]
    graphs = [bundle.graph_identity(name) for name in GRAPH_FILES]
    facts = {"graphs": graphs, "prompts": prompts, "generation": asdict(config.generation)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
