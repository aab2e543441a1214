"""One tensor of a checkpoint, known by its place in a shard and read on demand with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.errors import CheckpointError

__all__ = ["Tensor"]

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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

    # Plain reads and no mapping: pages of a mapping count as the process's own (RSS) until the kernel takes them back,
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
        item = _ITEM_BYTES[self.dtype]
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
        if self.dtype != "bfloat16":
            out = np.empty(self.shape, np.dtype(self.dtype))
            self.read_into(out.reshape(-1))
            return out
        bits = np.empty(self.nbytes // 2, np.uint16)
        self.read_into(bits)
        wide = bits.astype(np.uint32)
        np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32).reshape(self.shape)

    def _fill(self, file: Any, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"tensor {self.name} could not be read", found=f"{self.file} ends too early", do="download the shard again"
                )
            done += count
