"""The exported graphs in ONNX Runtime against the torch towers, output by output.

Two independent paths meet here: the written bytes and operators, and towers filled from the
checkpoint by other code. Inputs are random, non-zero and distinct (zeros would hide swapped
states), rows ragged, one chunk padded, one block half masked.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from twotower.bundle import DATA_SUFFIX, GRAPH_FILES
from twotower.checkpoint.layout import Tower, expected_tensors
from twotower.checkpoint.reader import Checkpoint
from twotower.config import LayerKind, ModelConfig
from twotower.errors import ExportError
from twotower.export.graph_files import point_to_data
from twotower.export.graphs.tower_graphs import build_graph
from twotower.model.context_tower import last_valid
from twotower.model.denoiser_tower import commit_step
from twotower.model.loading import load_context_tower, load_denoiser_tower
from twotower.onnx_runtime import ort, session_options
from twotower.spec import (
    BLOCK,
    CHUNK_LENGTH,
    COMMIT_FLOOR,
    CONTEXT,
    CONTEXT_HEAD,
    CONTEXT_LENGTH,
    DENOISER,
    NOISE,
    PAST_LENGTH,
    TEMPERATURE,
    THRESHOLD,
    TOKENS,
    candidate_count,
    state_tensors,
)
from twotower.units import format_bytes
from twotower.weights.declared import lay_out
from twotower.weights.external import attach_weights, load_graph, weight_refs, widen_to_float32
from twotower.weights.writer import widen_data

TOLERANCE = 1e-3
"""Largest error relative to a tensor's largest magnitude. Both sides compute in float32 and differ
in the order of sums of up to 131072 terms; a wrong operator, weight or state is an error near 1."""
# A router's choice on the very edge may fall differently in float32 and float64; a defect fails
# every time.
_ATTEMPTS = 3
_MEMORY_SHARE = 0.7

Report = Callable[[str, int, int], None]
Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is compared: a model of some layers of the exported one, which keep their weights."""

    folder: Path
    checkpoint: Checkpoint
    dtype: str
    config: ModelConfig
    layers: tuple[int, ...]

    def original(self, name: str) -> str:
        """A weight's name in the whole model."""
        return re.sub(
            r"(layers|scale_shift_tables)\.(\d+)",
            lambda m: f"{m[1]}.{self.layers[int(m[2])]}",
            name,
        )

    def read(self, name: str) -> torch.Tensor:
        array = self.checkpoint.tensors[self.original(name)].numpy()
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def context_errors(self, case: Case) -> Iterator[tuple[str, float]]:
        """The error of every output of the context tower and its head."""
        tower = load_context_tower(self.config, self.read, rounded_to=self.dtype)
        given, before = _tensors(case.context), _tensors(case.state)
        lengths = given[CHUNK_LENGTH]
        hidden, state = tower.extend(
            given[TOKENS], before, past=given[PAST_LENGTH], lengths=lengths
        )
        want = last_valid(hidden, lengths).numpy()
        want_logprobs = torch.log_softmax(tower.logits(torch.from_numpy(want)), -1).numpy()
        del tower
        got = self.run(CONTEXT, {**case.context, **case.state})
        busy = case.context[CHUNK_LENGTH] > 0
        yield "hidden", _error(got["hidden"][busy], want[busy])
        for s in state_tensors(self.config, "float32"):
            yield s.present.name, _error(got[s.present.name], state[s.past.name].numpy())
        head = self.run(CONTEXT_HEAD, {"hidden": want})
        at_ids = np.take_along_axis(want_logprobs, head["candidate_ids"], -1)
        yield "candidate_logprobs", _error(head["candidate_logprobs"], at_ids)
        yield "candidate_ids", _error(at_ids, -np.sort(-want_logprobs, -1)[:, : at_ids.shape[1]])

    def denoiser_errors(self, case: Case) -> Iterator[tuple[str, float]]:
        """The error of every output of the denoiser."""
        tower = load_denoiser_tower(self.config, self.read, rounded_to=self.dtype)
        sampling = _tensors(case.denoiser)
        block, length = sampling.pop(BLOCK), sampling.pop(CONTEXT_LENGTH)
        logits = tower.logits(block, _tensors(case.state), context_length=length)
        del tower
        want = commit_step(logits, block, self.config, **sampling)
        got = self.run(DENOISER, {**case.denoiser, **case.state})
        yield "confidence", _error(got["confidence"], want.confidence.numpy())
        for name in ("predicted", "next_block", "masked_left"):
            yield name, float(np.mean(got[name] != getattr(want, name).numpy()))

    def run(
        self,
        name: str,
        feeds: Arrays,
    ) -> Arrays:
        """One exported graph on float32 inputs, its weights mapped from the written data file."""
        file = self.folder / GRAPH_FILES[name]
        data = file.with_name(file.name + DATA_SUFFIX)
        model = load_graph(file)
        refs = weight_refs(model)
        if len(self.layers) != len(self.checkpoint.config.layers):
            # The graph of the selected layers; each weight where the whole model's file holds it.
            graph = build_graph(name, self.config, self.dtype)
            point_to_data(graph.model, lay_out(graph.weights), "unused")
            model = ir.to_proto(graph.model)
            refs = {w.name: refs[self.original(w.name)] for w in graph.weights}
        wide = file.with_name(f"{file.name}.float32")
        try:
            if self.dtype != "float32":
                widen_to_float32(model)
                refs, data = widen_data(data, wide, refs), wide
            attach_weights(model, refs, data.name)
            options = session_options(file.parent)
            # Nothing may be folded or packed: each would copy the weights into memory.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_prepacking", "1")
            text = model.SerializeToString()
            session = ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
            names = [o.name for o in session.get_outputs()]
            return dict(zip(names, session.run(names, feeds), strict=True))
        finally:
            wide.unlink(missing_ok=True)


def verify_bundle(
    folder: Path,
    checkpoint: Checkpoint,
    dtype: str,
    report: Report,
) -> dict[str, Any]:
    """Compares every output of the three graphs; the result is stored in the bundle.

    A half-precision graph is widened: rounding would hide what is looked for, and ONNX Runtime has
    no bfloat16 on a CPU. A model too large for memory is compared on its first layer of each kind.

    Raises:
        ExportError: an output differs by more than `TOLERANCE`.
    """
    started = time.perf_counter()
    layers, why = layers_that_fit(checkpoint.config, available_memory())
    config = _selected(checkpoint.config, layers) if layers else checkpoint.config
    scratch = _tower_bytes(config) if layers and dtype != "float32" else 0
    free = shutil.disk_usage(folder).free
    if scratch > free:
        needed = f"comparing takes {format_bytes(scratch)} of disk for a while"
        layers, why = (), f"{needed}, {format_bytes(free)} are free"
    if not layers:
        return {"verified": False, "why": why}
    subject = _Subject(folder, checkpoint, dtype, config, layers)
    errors: dict[str, float] = {}
    for attempt in range(1, _ATTEMPTS + 1):
        case = random_case(config, seed=attempt)
        report("verifying", 0, 2)
        errors = dict(subject.context_errors(case))
        report("verifying", 1, 2)
        errors.update(subject.denoiser_errors(case))
        if max(errors.values()) <= TOLERANCE:
            break
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= TOLERANCE:
        bad = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
        raise ExportError(
            f"the exported graphs do not compute what the checkpoint's towers compute ({why})",
            found=f"relative errors above {TOLERANCE:.0e}: {', '.join(bad[:12])}",
            do="report this with the checkpoint's config.json; --no-verify exports regardless",
        )
    computed_in = "float32"
    if dtype != "float32":
        computed_in += f", with the weights as rounded to {dtype}"
    return {
        "verified": True,
        "layers": why,
        "attempts": attempt,
        "tolerance": TOLERANCE,
        "largest_error": errors[worst],
        "errors": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "cases": "3 ragged rows, a padded chunk, a row without tokens, blocks fully, half and not "
        "masked, greedy and sampled",
        "computed_in": computed_in,
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 2),
    }


def layers_that_fit(config: ModelConfig, memory: int) -> tuple[tuple[int, ...], str]:
    """The layers to compare within `memory` bytes (all, first of a kind, or none), and in words."""
    every = tuple(range(len(config.layers)))
    first = tuple(sorted(config.indices(kind)[0] for kind in LayerKind if config.indices(kind)))
    if peak_bytes(config) <= _MEMORY_SHARE * memory:
        return every, f"all {len(every)} layers"
    needed, available = peak_bytes(_selected(config, first)), format_bytes(memory)
    if needed <= _MEMORY_SHARE * memory:
        named = ", ".join(f"{i} ({config.layers[i].value})" for i in first)
        why = f"the first layer of each kind only, {named}: the whole does not fit in {available}"
        return first, why
    need = f"comparing one layer of each kind takes {format_bytes(needed)} of memory"
    return (), f"{need}, {available} are available"


def peak_bytes(config: ModelConfig) -> int:
    """Memory a comparison takes: the larger tower in float32, and three quarters more in flight.

    Measured: 13.8 GB for 8.2 GB of weights. ONNX Runtime maps its weights from disk.
    """
    return _tower_bytes(config) * 7 // 4


def _tower_bytes(config: ModelConfig) -> int:
    """The larger tower in float32: the towers are compared one after the other."""
    sizes: Counter[Tower] = Counter()
    for tensor in expected_tensors(config).values():
        sizes[tensor.tower] += 4 * math.prod(tensor.shape)
    return max(sizes.values())


def _selected(config: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    return replace(config, layers=tuple(config.layers[i] for i in layers))


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Largest difference relative to the largest magnitude; infinite where NaN or infinity is."""
    difference = np.abs(got.astype(np.float64) - want).max() / (np.abs(want).max() + 1e-30)
    if np.isfinite(difference):
        return float(difference)
    return float("inf")


def available_memory() -> int:
    """Bytes that programs can have; half of all where the system does not say."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


_ROWS, _CHUNK, _BLOCK, _CAPACITY = 3, 8, 16, 32


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of both towers by name; `state` is what both read of the context, float32."""

    context: Arrays
    denoiser: Arrays
    state: Arrays


def random_case(config: ModelConfig, seed: int) -> Case:
    """Three rows: a full chunk at the start of a text, a padded one, one without tokens."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(config.vocab_size), [config.mask_token_id])
    block = rng.choice(words, (_ROWS, _BLOCK))
    block[0] = config.mask_token_id
    block[1, rng.permutation(_BLOCK)[: _BLOCK // 2]] = config.mask_token_id
    uniform = rng.uniform(
        1e-6,
        1 - 1e-6,
        (_ROWS, _BLOCK, candidate_count(config)),
    )
    sampling = {
        THRESHOLD: rng.uniform(0.0, 0.5, _ROWS).astype(np.float32),
        COMMIT_FLOOR: np.array([3, 1, 1]),
        TEMPERATURE: np.array([0.0, 0.7, 0.0], np.float32),
        NOISE: -np.log(-np.log(uniform)).astype(np.float32),
    }
    sizes = {"B": _ROWS, "T": _CAPACITY}
    state = {
        s.past.name: rng.standard_normal(s.past.shape(sizes)).astype(np.float32)
        for s in state_tensors(config, "float32")
    }
    lengths, past = np.array([_CHUNK, 3, 0]), np.array([0, 5, 17])
    tokens = rng.choice(words, (_ROWS, _CHUNK))
    return Case(
        {TOKENS: tokens, CHUNK_LENGTH: lengths, PAST_LENGTH: past},
        {BLOCK: block, CONTEXT_LENGTH: past + lengths, **sampling},
        state,
    )
