"""One shard of a checkpoint: its header, refused unless the file is exactly what it says, and its tensors, read on demand."""

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

from twotower.dtypes import carried_dtype, item_bytes, to_float32
from twotower.errors import CheckpointError

__all__ = ["ITEM_BYTES", "HeaderError", "StoredTensor", "Tensor", "read_header", "refuse_repeats"]

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own bound
_MAX_AXES = 64
_SHOWN = 200


class HeaderError(Exception):
    """Why a file is not a sound safetensors file; the caller adds which one and what to do."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header: dtype as the format writes it, absolute byte offset in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of one file; no tensor data are touched.

    Raises:
        HeaderError: the file is truncated, oversized, or its header is not sound.
        OSError: the file cannot be read.
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
    start = 8 + length
    out = {name: _stored(name, entry, start) for name, entry in raw.items()}
    end = start
    for tensor in sorted(out.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise HeaderError(f"its tensors overlap or leave a hole at byte {end}")
        end += tensor.nbytes
    if end != size:
        raise HeaderError(
            f"{'truncated' if size < end else 'oversized'}: {size} bytes, its header describes {end}"
        )
    return out


def refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: of two entries of one name, which one is meant would be a guess.

    Raises:
        ValueError: a key is there twice.
    """
    out = dict(pairs)
    if len(out) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} is there twice")
    return out


def _stored(name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        # The bounds keep a hostile header from costing minutes in multiplying numbers of thousands
        # of digits.
        sound = (
            dtype in ITEM_BYTES
            and len(shape) <= _MAX_AXES
            and all(type(d) is int and 0 <= d < 2**63 for d in (*shape, first, last))
        )
    except (TypeError, KeyError, ValueError) as e:
        raise HeaderError(f"the entry of {name!r} is malformed") from e
    if not sound or last - first != math.prod(shape) * ITEM_BYTES[dtype]:
        shown = f"dtype {dtype!r}, shape {list(shape)}, bytes {first!r} to {last!r}"
        raise HeaderError(f"the entry of {name!r} is malformed: {shown[:_SHOWN]}")
    return StoredTensor(dtype, shape, start + first, last - first)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, not yet read.

    Attributes:
        name: Its published name.
        dtype: `float32`, `float16` or `bfloat16`.
        shape: Its shape.
        file: The shard.
        offset: First byte in the shard.
        nbytes: Its size.
    """

    # Plain reads and no mapping: pages of a mapping count as the process's own (RSS) until the
    # kernel takes them back,
    # and a shard cut short under a mapping kills the process (SIGBUS) where a read can say so.

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read_into(self, buffer: Any) -> None:
        """Fills a writable contiguous buffer with the tensor's raw little-endian bytes.

        Raises:
            ValueError: the buffer is not of `nbytes` bytes.
            CheckpointError: the shard became shorter since it was opened.
        """
        view = memoryview(buffer).cast("B") if self.nbytes else memoryview(bytearray())
        if len(view) != self.nbytes:
            raise ValueError(f"{self.name} has {self.nbytes} bytes, the buffer {len(view)}")
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            self._fill(file, view)

    def chunks(self, chunk_bytes: int) -> Iterator[bytes]:
        """Its raw little-endian bytes in pieces of whole elements, none larger than `chunk_bytes` (at least one element).

        Raises:
            CheckpointError: the shard became shorter since it was opened.
        """
        item = item_bytes(self.dtype)
        step = max(item, chunk_bytes - chunk_bytes % item)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, step):
                count = min(step, self.nbytes - start)
                piece = file.read(count)
                if len(piece) < count:  # a short read is allowed, a cut element is not
                    whole = bytearray(count)
                    whole[: len(piece)] = piece
                    self._fill(file, memoryview(whole)[len(piece) :])
                    piece = bytes(whole)
                yield piece

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The whole tensor in an array of its own: float16 and float32 as they are, bfloat16 widened to float32."""
        out = np.empty(self.shape, carried_dtype(self.dtype))
        self.read_into(out.reshape(-1))
        return to_float32(out, self.dtype) if self.dtype == "bfloat16" else out

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
