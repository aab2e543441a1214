"""Pass times for mode `auto`: measured on scratch rows, or read from what `twotower tune` kept."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from twotower.bundle import BUILD_FILE, Bundle, engine_folder
from twotower.hardware import Machine, installed_version
from twotower.processors import usable_cores
from twotower.runtime.auto import PassRecord, PassTimes, Setting
from twotower.runtime.engines import OpenOptions
from twotower.runtime.workspace import Workspace

RECORD_FILE = "reports/tune.json"
_KEY = "auto"

logger = logging.getLogger(__name__)


def measured_on(
    bundle: Bundle, target: str, machine: Machine, options: OpenOptions
) -> dict[str, Any]:
    """What pass times belong to: with any of it changed they say nothing."""
    build = (engine_folder(bundle, target) / BUILD_FILE).read_bytes()
    return {
        "target": target,
        "engines": sha256(build).hexdigest(),
        "library": installed_version(machine, target),
        "processor": machine.processor,
        "cores": usable_cores(),
        "gpus": [gpu.name for gpu in machine.gpus],
        "driver": machine.driver,
        "threads": options.threads,
        "devices": list(options.devices),
        "graphs": options.graphs,
    }


def read_pass_record(folder: Path, here: Mapping[str, Any]) -> PassRecord | None:
    """The bundle's pass record measured on just `measured_on`; None, logged, without one."""
    file, record = folder / RECORD_FILE, PassRecord(here)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))[_KEY]
        other = sorted(key for key in here if data["measured_on"].get(key) != here[key])
        if other:
            logger.info("%s: pass times of another %s are ignored", file, ", ".join(other))
            return None
        for one in data["times"]:
            names = ("denoise_ms", "extend_ms", "step_ms")
            times = PassTimes(**{name: _positive(one[name]) for name in names})
            record.times.setdefault(int(one["block_size"]), {})[int(one["rows"])] = times
        for one in data["passes"]:
            setting = Setting(
                float(one["threshold"]),
                int(one["steps"]),
                int(one["block_size"]),
            )
            record.passes[setting] = _positive(one["passes_per_block"]), int(one["blocks"])
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
        logger.info("%s has no pass times that can be read: %s: %s", file, type(e).__name__, e)
        return None
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


def measure_pass_times(work: Workspace, block_size: int) -> PassTimes:
    """Medians of three passes of each kind, by wall clock around work that is waited for.

    Rows hold random words, since how many experts a layer computes depends on its tokens: padding
    would be too fast. The context is a block long, so the reading of long caches is not in it.
    """
    config = work.model
    special = [config.mask_token_id, *config.eos_token_ids]
    words = np.setdiff1d(np.arange(config.vocab_size), special)
    rows, rng = len(work.past_length), np.random.default_rng(0)
    tokens = rng.choice(words, (rows, block_size))
    arrays = work.denoiser(block_size)

    def read(past: int, width: int) -> None:
        work.past_length[:], work.chunk_length[:] = past, width
        work.tokens(width)[:] = tokens[:, :width]
        work.extend(width).wait_done()

    def extend() -> None:
        read(0, block_size)

    def denoise() -> None:
        arrays.block[:] = tokens
        arrays.block[:, ::2] = config.mask_token_id  # a block half done
        arrays.context_length[:], arrays.commit_floor[:] = block_size, 1
        arrays.threshold[:], arrays.temperature[:], arrays.noise[:] = 1, 0, 0
        work.denoise().wait_done()

    def step() -> None:
        read(block_size, 1)
        work.head().wait_done()

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


def run_every_pass(work: Workspace, *, widths: Sequence[int], block_size: int) -> None:
    """Runs every pass, to finish a library's set-up for each shape; clear `work` afterwards."""
    for width in dict.fromkeys(widths):
        for _ in range(_SETS):
            _read(work, width)
    arrays = work.denoiser(block_size)
    for _ in range(_SETS):
        arrays.use(0, unmasked=work.unmasked)
        work.denoise().wait_done()
        _read(work, 1)
    work.head().wait_done()


def _read(work: Workspace, width: int) -> None:
    """A chunk without a valid token: the state stays as it is."""
    work.past_length[:] = work.chunk_length[:] = 0
    work.tokens(width).fill(0)
    work.extend(width).wait_done()
