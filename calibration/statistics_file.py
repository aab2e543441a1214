"""Statistics on disk: a folder with numbers (safetensors), what they are of (JSON) and a picture, and the state of an interrupted run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from twotower import __version__
from twotower.bundle import Bundle, hash_file, write_json
from twotower.calibration.statistics import BINS, TowerStatistics
from twotower.errors import CalibrationError
from twotower.files import replacing

__all__ = [
    "DATA_FILE",
    "DESCRIPTION_FILE",
    "KIND",
    "Statistics",
    "identity_of",
    "read_statistics",
    "write_statistics",
]

KIND = "twotower-statistics"
SCHEMA = 1
DATA_FILE, DESCRIPTION_FILE = "statistics.safetensors", "statistics.json"
_AGAIN = "run `twotower calibrate BUNDLE --prompts FILE -o NEW` again"


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was seen in both towers.

    Attributes:
        path: The folder.
        source: Identity of the checkpoint (`identity_of`).
        towers: By name, `context` and `denoiser`.
        facts: How they were gathered: prompts, passes, options, versions.
        sha256: Of the numbers; empty before they are written.
    """

    path: Path
    source: str
    towers: Mapping[str, TowerStatistics]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""


def identity_of(bundle: Bundle) -> str:
    """A hash of the checkpoint's shards: bundles of one checkpoint in other types have the same activations but for rounding."""
    return hashlib.sha256(
        json.dumps(bundle.source.get("shards", bundle.source), sort_keys=True).encode()
    ).hexdigest()


def write_statistics(statistics: Statistics, folder: Path) -> None:
    """Writes both files into an existing folder, the description last.

    Raises:
        OSError: the disk is full or fails.
    """
    arrays = {
        f"{tower}.{name}": array
        for tower, s in statistics.towers.items()
        for name, array in s.arrays().items()
    }
    with replacing(folder / DATA_FILE) as partial:
        save_file(arrays, partial)
        digest = hash_file(partial)
    write_json(
        folder / DESCRIPTION_FILE,
        {
            "schema": SCHEMA,
            "kind": KIND,
            "twotower": __version__,
            "source": statistics.source,
            "data": {"file": DATA_FILE, "sha256": digest},
            "towers": {
                tower: {"inputs_of": list(s.names), "buckets": list(s.buckets)}
                for tower, s in statistics.towers.items()
            },
            "facts": dict(statistics.facts),
        },
    )


def read_statistics(folder: Path) -> Statistics:
    """Reads and checks statistics.

    Raises:
        CalibrationError: the folder holds none, or damaged ones, or a range that is not a number.
    """
    try:
        data = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        if data.get("kind") != KIND or data.get("schema") != SCHEMA:
            found = f"kind {data.get('kind')!r}, schema {data.get('schema')!r}; this version reads {KIND} {SCHEMA}"
            raise CalibrationError(
                f"'{folder}' does not hold statistics of this version", found=found, do=_AGAIN
            )
        digest = hash_file(folder / DATA_FILE)
        if digest != data["data"]["sha256"]:
            raise CalibrationError(
                f"'{folder / DATA_FILE}' has changed",
                found="its SHA-256 is not the one noted",
                do=_AGAIN,
            )
        arrays = load_file(folder / DATA_FILE)
        towers = {
            tower: TowerStatistics(
                tuple(known["inputs_of"]),
                tuple(known["buckets"]),
                *(
                    arrays[f"{tower}.{name}"]
                    for name in ("histogram", "minimum", "maximum", "squares")
                ),
            )
            for tower, known in data["towers"].items()
        }
        statistics = Statistics(folder, str(data["source"]), towers, data["facts"], digest)
    except OSError as e:
        found = "no such folder" if not folder.is_dir() else str(e)
        raise CalibrationError(f"'{folder}' holds no statistics", found=found, do=_AGAIN) from e
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise CalibrationError(
            f"the statistics in '{folder}' are damaged", found=f"{type(e).__name__}: {e}", do=_AGAIN
        ) from e
    _check(statistics)
    return statistics


def _check(statistics: Statistics) -> None:
    for tower, s in statistics.towers.items():
        shape = (len(s.names), len(s.buckets))
        if (
            s.histogram.shape != (*shape, BINS)
            or s.minimum.shape != shape
            or s.maximum.shape != shape
        ):
            found = f"{tower}: arrays of shape {s.histogram.shape}, {len(s.names)} inputs are named"
            raise CalibrationError(
                f"the statistics in '{statistics.path}' do not fit their description",
                found=found,
                do=_AGAIN,
            )
        seen = s.count > 0
        broken = [
            s.names[i]
            for i, k in np.argwhere(seen & ~(np.isfinite(s.minimum) & np.isfinite(s.maximum)))
        ]
        if broken:
            raise CalibrationError(
                f"the statistics in '{statistics.path}' hold a range that is not a number",
                found=", ".join(broken[:5]),
                do=_AGAIN,
            )
