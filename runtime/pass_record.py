"""Pass times and passes a block that `twotower tune` keeps, with what they were measured on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from twotower.bundle import BUILD_FILE, Bundle, engine_folder
from twotower.hardware import Machine, installed_version
from twotower.processors import usable_cores
from twotower.runtime.auto import PassTimes, Setting

__all__ = ["RECORD_FILE", "PassRecord", "measured_on", "read_pass_record"]

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
