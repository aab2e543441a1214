"""Pass times, by which mode `auto` decides: measured on scratch rows, or kept by `twotower tune` with what they were measured on.

Every pass of a session can be run so once: what a library does in a shape's first run is then done.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from twotower.bundle import BUILD_FILE, Bundle, engine_folder
from twotower.config import ModelConfig
from twotower.hardware import Machine, installed_version
from twotower.processors import usable_cores
from twotower.runtime.auto import PassTimes, Setting
from twotower.runtime.device import Streams
from twotower.runtime.workspace import Workspace

__all__ = [
    "FIRST",
    "RECORD_FILE",
    "RUNS",
    "PassRecord",
    "measure_pass_times",
    "measured_on",
    "read_pass_record",
    "run_every_pass",
]

RECORD_FILE = "reports/tune.json"
_KEY = "auto"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What is known of passes before a session has run any.

    Attributes:
        measured_on: Engines, library, machine and options of the measurement, as plain data.
        times: By block size, then by number of rows.
        passes: Blocks and passes of single requests, by setting: (passes a block, blocks).
    """

    measured_on: Mapping[str, Any]
    times: dict[int, dict[int, PassTimes]] = field(default_factory=dict)
    passes: dict[Setting, tuple[float, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `read_pass_record` reads back."""
        times: list[dict[str, Any]] = []
        for size, by_rows in self.times.items():
            times += [{"block_size": size, "rows": n, **asdict(t)} for n, t in by_rows.items()]
        passes: list[dict[str, Any]] = []
        for setting, (mean, blocks) in self.passes.items():
            passes.append({**setting._asdict(), "passes_per_block": mean, "blocks": blocks})
        return {"measured_on": dict(self.measured_on), "times": times, "passes": passes}


def measured_on(
    bundle: Bundle,
    target: str,
    machine: Machine,
    *,
    threads: int,
    devices: Sequence[int],
    graphs: bool,
) -> dict[str, Any]:
    """What pass times belong to: with any of it changed they say nothing.

    Args:
        bundle: The opened bundle.
        target: Its engines that run.
        machine: What `probe_machine` found.
        threads: As given to `TwoTower.open`, and likewise
        devices: GPUs and
        graphs: whether passes are replayed.
    """
    build = (engine_folder(bundle, target) / BUILD_FILE).read_bytes()
    return {
        "target": target,
        "engines": sha256(build).hexdigest(),
        "library": installed_version(machine, target),
        "processor": machine.processor,
        "cores": usable_cores(),
        "gpus": [gpu.name for gpu in machine.gpus],
        "driver": machine.driver,
        "threads": threads,
        "devices": list(devices),
        "graphs": graphs,
    }


def read_pass_record(folder: Path, here: Mapping[str, Any]) -> PassRecord | None:
    """The bundle's record, if there is one and it was measured on just this.

    Args:
        folder: The bundle's.
        here: What `measured_on` says of this session.

    Returns:
        None where there is none, where it is of something else, and where it cannot be read; the
        log says which.
    """
    file = folder / RECORD_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))[_KEY]
        other = sorted(key for key in here if data["measured_on"].get(key) != here[key])
        if other:
            logger.info("%s: pass times of another %s are ignored", file, ", ".join(other))
            return None
        return _parsed(data, here)
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        logger.info("%s has no pass times that can be read: %s: %s", file, type(e).__name__, e)
        return None


def _parsed(data: Mapping[str, Any], here: Mapping[str, Any]) -> PassRecord:
    record = PassRecord(here)
    for one in data["times"]:
        names = ("denoise_ms", "extend_ms", "step_ms")
        times = PassTimes(**{name: _positive(one[name]) for name in names})
        record.times.setdefault(int(one["block_size"]), {})[int(one["rows"])] = times
    for one in data["passes"]:
        setting = Setting(float(one["threshold"]), int(one["steps"]), int(one["block_size"]))
        record.passes[setting] = _positive(one["passes_per_block"]), int(one["blocks"])
    return record


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is no time and no number of passes")
    return number


RUNS = 3
"""Passes of each kind that count."""

FIRST = 2
"""Passes before them that do not: engines bind each of the two sets of Mamba states in them."""


def measure_pass_times(
    work: Workspace,
    config: ModelConfig,
    *,
    block_size: int,
    streams: Streams,
) -> PassTimes:
    """Medians of three passes of each kind, by wall clock around work that is waited for.

    Rows hold random words, since how many experts a layer computes depends on its tokens: padding
    would be too fast. The context is a block long, so the reading of long caches is not in it.

    Args:
        work: Buffers with room for `block_size` + 1 positions, of which nothing is kept; they
            must be cleared before they are used.
        config: The model.
        block_size: S.
        streams: The towers' queues.
    """
    special = [config.mask_token_id, *config.eos_token_ids]
    words = np.setdiff1d(np.arange(config.vocab_size), special)
    rows, rng = len(work.past_length), np.random.default_rng(0)
    tokens = rng.choice(words, (rows, block_size))
    arrays = work.denoiser(block_size)

    def read(past: int, width: int) -> None:
        work.past_length[:], work.chunk_length[:] = past, width
        work.tokens(width)[:] = tokens[:, :width]
        work.extend(width, streams.context).wait_done()

    def extend() -> None:
        read(0, block_size)

    def denoise() -> None:
        arrays.block[:] = tokens
        arrays.block[:, ::2] = config.mask_token_id  # a block half done
        arrays.context_length[:], arrays.commit_floor[:] = block_size, 1
        arrays.threshold[:], arrays.temperature[:], arrays.noise[:] = 1, 0, 0
        work.denoise(streams.denoiser).wait_done()

    def step() -> None:
        read(block_size, 1)
        work.head(streams.context).wait_done()

    return PassTimes(
        extend_ms=_milliseconds(extend),
        denoise_ms=_milliseconds(denoise),
        step_ms=_milliseconds(step),
    )


def _milliseconds(run: Callable[[], None]) -> float:
    """One kind in a row, as steps and denoiser passes come: another would empty the caches."""
    seconds = []
    for _ in range(FIRST + RUNS):
        started = perf_counter()
        run()
        seconds.append(perf_counter() - started)
    return 1000 * median(seconds[FIRST:])


_SETS = 2  # of Mamba states: each has bindings of its own


def run_every_pass(
    work: Workspace,
    *,
    widths: Sequence[int],
    block_size: int,
    streams: Streams,
) -> None:
    """Runs the context tower over chunks, the denoiser over a block, and the head.

    Args:
        work: Buffers, of which nothing is kept; they must be cleared before they are used.
        widths: Columns of the chunks.
        block_size: S.
        streams: The towers' queues.
    """
    for width in dict.fromkeys(widths):
        for _ in range(_SETS):
            _read(work, width, streams)
    arrays = work.denoiser(block_size)
    for _ in range(_SETS):
        arrays.use(0, unmasked=work.unmasked)
        work.denoise(streams.denoiser).wait_done()
        _read(work, 1, streams)
    work.head(streams.context).wait_done()


def _read(work: Workspace, width: int, streams: Streams) -> None:
    """A chunk without a valid token: the state stays as it is."""
    work.past_length[:] = work.chunk_length[:] = 0
    work.tokens(width).fill(0)
    work.extend(width, streams.context).wait_done()
