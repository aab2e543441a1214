"""Data files written front to back in bounded memory: from a checkpoint, or from a data file whose weights are widened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twotower.checkpoint.reader import Checkpoint
from twotower.dtypes import stored_bytes
from twotower.files import FileRecord
from twotower.weights.conversion import convert_chunks, read_weight
from twotower.weights.declared import Weight, lay_out
from twotower.weights.refs import WeightRef, aligned

__all__ = ["stream_weights", "widen_data"]

_CHUNK = 16 << 20
_PIECE = 4 << 20  # elements widened at a time


def stream_weights(
    path: Path,
    weights: Sequence[Weight],
    checkpoint: Checkpoint,
    *,
    tick: Callable[[int], None] | None = None,
) -> FileRecord:
    """Writes a data file front to back and hashes it on the way.

    Memory stays at a few chunks of 16 MiB whatever the model. `tick` gets the bytes of each piece
    written.

    Raises:
        OSError: the disk is full or fails.
        ExportError: a value does not fit the wanted dtype.
    """
    refs = lay_out(weights)
    digest = hashlib.sha256()
    end = 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for weight in weights:
            padding = bytes(refs[weight.name].offset - end)
            for piece in _with(padding, _pieces(weight, checkpoint)):
                # Hashing and writing both release the interpreter: the two run side by side on two
                # cores.
                hashed = hasher.submit(digest.update, piece)
                view = memoryview(piece).cast("B")
                written = 0
                while written < len(view):
                    written += file.write(view[written:]) or 0
                hashed.result()
                if tick:
                    tick(len(view))
            end = refs[weight.name].offset + weight.nbytes
        size = file.tell()
    assert size == end, f"{path.name}: wrote {size} bytes, laid out {end}"
    return FileRecord(size, digest.hexdigest())


def _with(padding: bytes, pieces: Iterable[Any]) -> Iterator[Any]:
    if padding:
        yield padding
    yield from pieces


def _pieces(weight: Weight, checkpoint: Checkpoint) -> Iterator[Any]:
    for name in weight.sources:
        tensor = checkpoint.tensors[name]
        if weight.negated_exp:
            yield (
                np.negative(np.exp(tensor.numpy().astype(np.float64))).astype(np.float32).tobytes()
            )
        elif weight.transposed:
            pieces = convert_chunks(tensor, weight.dtype, chunk_bytes=_CHUNK)
            item = f"V{stored_bytes(weight.dtype, 1)}"
            elements = np.frombuffer(b"".join(map(bytes, pieces)), item)
            yield elements.reshape(-1, weight.shape[0]).T.tobytes()
        else:
            yield from convert_chunks(tensor, weight.dtype, chunk_bytes=_CHUNK)


def widen_data(
    source: Path,
    target: Path,
    refs: dict[str, WeightRef],
    tick: Callable[[int], None] | None = None,
) -> dict[str, WeightRef]:
    """Copies weights into a data file, in float32 what is of half width and as they are the quantized ones, 16 MiB at a time.

    Args:
        source: The data file `refs` points into.
        target: The file to write.
        refs: The weights to take.
        tick: Called with the bytes read for each piece.

    Returns:
        Where the weights lie in the new file.
    """
    data = np.memmap(source, dtype=np.uint8, mode="r")
    out: dict[str, WeightRef] = {}
    end = 0
    with target.open("wb") as file:
        for name, ref in sorted(refs.items(), key=lambda item: item[1].offset):
            kept = WeightRef("float32" if ref.narrow else ref.dtype, ref.shape, 0)
            out[name] = replace(kept, offset=aligned(end, kept.nbytes))
            file.seek(out[name].offset)
            for piece in _widened_pieces(data, ref):
                piece.tofile(file)
                if tick:
                    tick(piece.nbytes // 2 if ref.narrow else piece.nbytes)
            end = out[name].offset + out[name].nbytes
    return out


def _widened_pieces(
    data: np.ndarray[Any, np.dtype[np.uint8]], ref: WeightRef
) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
    if not ref.narrow:
        for first in range(ref.offset, ref.offset + ref.nbytes, 4 * _PIECE):
            yield data[first : min(first + 4 * _PIECE, ref.offset + ref.nbytes)]
        return
    count = math.prod(ref.shape)
    for first in range(0, count, _PIECE):
        piece = WeightRef(ref.dtype, (min(_PIECE, count - first),), ref.offset + first * 2)
        yield read_weight(data, piece).astype(np.float32, copy=False)
