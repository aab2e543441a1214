"""One shard of a checkpoint: its checked header, and its tensors, read on demand."""

from __future__ import annotations

import json
import math
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.dtypes import DTYPES, FLOATS, carried_dtype, item_bytes, to_float32
from twotower.errors import CheckpointError

_TYPES_BY_BYTES = {
    8: ("F64", "I64", "U64"),
    4: ("F32", "I32", "U32"),
    2: ("F16", "BF16", "I16", "U16"),
    1: ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"),
}
_ITEM_BYTES = {name: size for size, names in _TYPES_BY_BYTES.items() for name in names}
FLOAT_DTYPES = {DTYPES[name].safetensors: name for name in FLOATS}
"""Our names of the types that weights can have, by those of the format."""

_MAX_HEADER = 100_000_000  # the format's own bound
_MAX_AXES = 64
_SHOWN = 200


class HeaderError(Exception):
    """Why a file is not a sound safetensors file; the caller adds which one and what to do."""


def read_header(path: Path) -> dict[str, Tensor]:
    """Reads the header of one file; no tensor data are touched.

    HeaderError if the file is truncated, oversized, or its header is not sound.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer for ever
        raise HeaderError("not a regular file")
    size = status.st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or length > min(_MAX_HEADER, size - 8):
            raise HeaderError(
                f"truncated or not a safetensors file ({size} bytes, header says {length})"
            )
        try:
            raw = json.loads(file.read(length), object_pairs_hook=refuse_repeats)
        except (ValueError, RecursionError) as e:
            raise HeaderError(f"its header is not JSON ({e})") from e
    if not isinstance(raw, dict):
        raise HeaderError("its header is not a JSON object")
    raw.pop("__metadata__", None)
    end = 8 + length
    out = {name: _stored(name, entry, path, end) for name, entry in raw.items()}
    for tensor in sorted(out.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise HeaderError(f"its tensors overlap or leave a hole at byte {end}")
        end += tensor.nbytes
    if end != size:
        wrong = "truncated" if size < end else "oversized"
        raise HeaderError(f"{wrong}: {size} bytes, its header describes {end}")
    return out


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if a key is there twice, as which one is meant would be a guess."""
    out = dict(pairs)
    if len(out) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return out


def _stored(name: str, entry: Any, path: Path, start: int) -> Tensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        # The bounds keep a hostile header from costing minutes in multiplying numbers of thousands
        # of digits.
        sound = (
            dtype in _ITEM_BYTES
            and len(shape) <= _MAX_AXES
            and all(type(d) is int and 0 <= d < 2**63 for d in (*shape, first, last))
        )
    except (TypeError, KeyError, ValueError) as e:
        raise HeaderError(f"the entry of {name!r} is malformed") from e
    if not sound or last - first != math.prod(shape) * _ITEM_BYTES[dtype]:
        shown = f"dtype {dtype!r}, shape {list(shape)}, bytes {first!r} to {last!r}"
        raise HeaderError(f"the entry of {name!r} is malformed: {shown[:_SHOWN]}")
    known = FLOAT_DTYPES.get(dtype, dtype)
    return Tensor(name, known, shape, path, start + first, last - first)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, not yet read: `nbytes` from byte `offset` of a shard.

    `name` is the published one; `dtype` is `float32`, `float16` or `bfloat16` in a checkpoint that
    was opened, and of other types the name in the header.
    """

    # Plain reads and no mapping: pages of a mapping count as the process's own (RSS) until the
    # kernel takes them back, and a shard cut short under a mapping kills the process (SIGBUS) where
    # a read can say so.

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def chunks(self, chunk_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Its raw little-endian bytes in pieces of at most `chunk_bytes`, but one element at least.

        CheckpointError if the shard became shorter since it was opened.
        """
        item = item_bytes(self.dtype)
        step = max(item, chunk_bytes - chunk_bytes % item)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, step):
                piece = np.empty(min(step, self.nbytes - start), np.uint8)
                self._fill(file, piece.data)
                yield piece

    def numpy(self) -> npt.NDArray[Any]:
        """The whole tensor in an array of its own, bfloat16 widened to float32."""
        (raw,) = self.chunks(self.nbytes)
        if self.dtype == "bfloat16":
            return to_float32(raw, self.dtype).reshape(self.shape)
        return raw.view(carried_dtype(self.dtype)).reshape(self.shape)

    def _fill(self, file: Any, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"tensor {self.name} could not be read",
                    found=f"{self.file} ends too early",
                    do="download the shard again",
                )
            done += count
