"""Histograms of activations: gathered a pass at a time in bounded memory, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from twotower import __version__
from twotower.bundle import Bundle, hash_file, write_json
from twotower.errors import CalibrationError
from twotower.files import replacing

CONTEXT_BUCKETS = ("text",)
DENOISER_BUCKETS = ("0", *(f"{i}/8" for i in range(1, 9)))
"""Masked fraction t of the block: 0 is a finished block, i/8 everything in ((i-1)/8, i/8]."""

_LOWEST, _HIGHEST, _PER_OCTAVE = -24, 24, 8
BINS = 1 + (_HIGHEST - _LOWEST) * _PER_OCTAVE
"""Bins of a histogram of magnitudes: one for everything below 2^-24, then eight of equal width in
every octave up to 2^24."""

_FIRST_KEY = (127 + _LOWEST) * _PER_OCTAVE
_INFINITE = 0x7F800000

KIND = "twotower-statistics"
SCHEMA = 1
DATA_FILE, DESCRIPTION_FILE = "statistics.safetensors", "statistics.json"
_AGAIN = "run `twotower calibrate BUNDLE --prompts FILE -o NEW` again"


def bin_edges() -> npt.NDArray[np.float64]:
    """Lower edge of every bin and the upper edge of the last, [BINS + 1]."""
    octaves = np.exp2(np.arange(_LOWEST, _HIGHEST, dtype=np.float64))
    inner = octaves[:, None] * (1 + np.arange(_PER_OCTAVE) / _PER_OCTAVE)
    return np.concatenate(([0.0], inner.reshape(-1), [2.0**_HIGHEST]))


def bucket_of(masked: int, block_size: int) -> int:
    """The bucket of `DENOISER_BUCKETS` for a block with so many masks."""
    return -(-8 * masked // block_size)


@dataclass(slots=True)
class TowerStatistics:
    """What was seen of the inputs of a tower's products, N inputs in K buckets.

    `names` has the first weight each input is multiplied with. `histogram` [N,K,BINS] int64 counts
    magnitudes; `minimum` and `maximum` [N,K] float32 are +inf and -inf where nothing was seen;
    `squares` [N,K] float64 are sums of squares.
    """

    names: tuple[str, ...]
    buckets: tuple[str, ...]
    histogram: npt.NDArray[np.int64]
    minimum: npt.NDArray[np.float32]
    maximum: npt.NDArray[np.float32]
    squares: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, names: Sequence[str], buckets: Sequence[str]) -> TowerStatistics:
        """Nothing seen yet."""
        size = (len(names), len(buckets))
        infinite = np.full(size, np.inf, np.float32)
        counts = np.zeros((*size, BINS), np.int64)
        return cls(
            tuple(names),
            tuple(buckets),
            counts,
            infinite,
            -infinite,
            np.zeros(size),
        )

    @property
    def count(self) -> npt.NDArray[np.int64]:
        """Values seen, [N,K]."""
        return np.asarray(self.histogram.sum(axis=-1))

    @property
    def amax(self) -> npt.NDArray[np.float32]:
        """Greatest magnitude, [N,K]; NaN where nothing was seen."""
        out = np.maximum(np.abs(self.minimum), np.abs(self.maximum))
        return np.where(self.count > 0, out, np.float32(np.nan))

    def add(self, index: int, bucket: int, x: npt.NDArray[Any]) -> None:
        """Takes values of one input in; CalibrationError for NaN or infinity.

        The bin is the number's exponent and the first three bits of its mantissa.
        """
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        if not flat.size:
            return
        bits = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
        if int(bits.max()) >= _INFINITE:
            raise CalibrationError(
                f"the input of {self.names[index]} is not finite",
                found=f"NaN or infinity at masked fraction {self.buckets[bucket]}",
                do="check the bundle with `twotower doctor BUNDLE`; "
                "half-precision models overflow where float32 does not",
            )
        keys = np.clip(
            (bits >> np.uint32(20)).astype(np.int64) - _FIRST_KEY + 1,
            0,
            BINS - 1,
        )
        self.histogram[index, bucket] += np.bincount(keys, minlength=BINS)
        self.minimum[index, bucket] = min(self.minimum[index, bucket], flat.min())
        self.maximum[index, bucket] = max(self.maximum[index, bucket], flat.max())
        self.squares[index, bucket] += float(np.square(flat, dtype=np.float64).sum())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, as they are stored."""
        return {
            "histogram": self.histogram,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "squares": self.squares,
        }


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was seen in both towers; on disk a folder with numbers and what they are of.

    `facts` says how they were gathered (prompts, passes, options, versions); `sha256` is of the
    numbers and empty before they are written.
    """

    path: Path
    source: str
    towers: Mapping[str, TowerStatistics]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""


def identity_of(bundle: Bundle) -> str:
    """A hash of the checkpoint's shards.

    Bundles of one checkpoint in other types have the same activations but for rounding.
    """
    shards = bundle.source.get("shards", bundle.source)
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def write_statistics(statistics: Statistics, folder: Path) -> None:
    """Writes both files into an existing folder, the description last."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    towers: dict[str, Any] = {}
    for tower, seen in statistics.towers.items():
        towers[tower] = {"inputs_of": list(seen.names), "buckets": list(seen.buckets)}
        arrays |= {f"{tower}.{name}": array for name, array in seen.arrays().items()}
    with replacing(folder / DATA_FILE) as partial:
        save_file(arrays, partial)
        digest = hash_file(partial)
    description = {
        "schema": SCHEMA,
        "kind": KIND,
        "twotower": __version__,
        "source": statistics.source,
        "data": {"file": DATA_FILE, "sha256": digest},
        "towers": towers,
        "facts": dict(statistics.facts),
    }
    write_json(folder / DESCRIPTION_FILE, description)


def read_statistics(folder: Path) -> Statistics:
    """Reads and checks statistics; CalibrationError if there are none, or damaged ones."""
    try:
        data = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        kind, schema = data.get("kind"), data.get("schema")
        if (kind, schema) != (KIND, SCHEMA):
            raise CalibrationError(
                f"'{folder}' does not hold statistics of this version",
                found=f"kind {kind!r}, schema {schema!r}; this version reads {KIND} {SCHEMA}",
                do=_AGAIN,
            )
        digest = hash_file(folder / DATA_FILE)
        if digest != data["data"]["sha256"]:
            raise CalibrationError(
                f"'{folder / DATA_FILE}' has changed",
                found="its SHA-256 is not the one noted",
                do=_AGAIN,
            )
        arrays = load_file(folder / DATA_FILE)
        towers = {}
        for tower, known in data["towers"].items():
            names, buckets = tuple(known["inputs_of"]), tuple(known["buckets"])
            seen = TowerStatistics.empty(names, buckets)
            for name, empty in seen.arrays().items():
                stored = arrays[f"{tower}.{name}"]
                if stored.shape != empty.shape:
                    raise CalibrationError(
                        f"the statistics in '{folder}' do not fit their description",
                        found=f"{tower}: {name} of shape {stored.shape}, {len(names)} inputs named",
                        do=_AGAIN,
                    )
                setattr(seen, name, stored)
            towers[tower] = seen
        statistics = Statistics(
            folder,
            str(data["source"]),
            towers,
            data["facts"],
            digest,
        )
    except OSError as e:
        found = "no such folder" if not folder.is_dir() else str(e)
        raise CalibrationError(f"'{folder}' holds no statistics", found=found, do=_AGAIN) from e
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
        raise CalibrationError(
            f"the statistics in '{folder}' are damaged", found=f"{type(e).__name__}: {e}", do=_AGAIN
        ) from e
    for seen in towers.values():
        finite = np.isfinite(seen.minimum) & np.isfinite(seen.maximum)
        broken = [seen.names[i] for i, _ in np.argwhere((seen.count > 0) & ~finite)]
        if broken:
            raise CalibrationError(
                f"the statistics in '{folder}' hold a range that is not a number",
                found=", ".join(broken[:5]),
                do=_AGAIN,
            )
    return statistics
