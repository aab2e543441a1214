"""Data files, written front to back in bounded memory, aligned, and hashed on the way.

`write_data` is the one writer. What differs is where the bytes of a weight come from: here a
checkpoint, or a data file whose half-precision weights are widened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.checkpoint.reader import Checkpoint
from twotower.checkpoint.shard import Tensor
from twotower.dtypes import stored_bytes, to_float32, to_stored
from twotower.errors import ExportError
from twotower.files import FileRecord
from twotower.weights.declared import Weight, lay_out
from twotower.weights.mapped import PIECE_BYTES, float32_pieces, raw_pieces
from twotower.weights.refs import WeightRef, place

Piece = bytes | npt.NDArray[Any]


def write_data(
    path: Path,
    places: Mapping[str, WeightRef],
    pieces: Callable[[str], Iterable[Piece]],
    tick: Callable[[int], None] | None = None,
) -> FileRecord:
    """Writes the weights of a data file; returns its size and SHA-256.

    Args:
        path: The file.
        places: Where each weight lies, ascending.
        pieces: The contents of a weight by its name, contiguous, one after another. Asked for in
            the order of the file, and consumed before the next is asked for.
        tick: Called with the bytes of each piece written; padding is not counted.

    Raises:
        OSError: the disk is full or fails.
    """
    digest = hashlib.sha256()
    end = 0
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:

        def write(piece: Any) -> int:
            # Hashing and writing both release the interpreter: they run side by side on two cores.
            view = memoryview(piece).cast("B")
            hashed = hasher.submit(digest.update, view)
            written = 0
            while written < len(view):
                written += file.write(view[written:]) or 0
            hashed.result()
            return len(view)

        for name, ref in places.items():
            if ref.offset > end:
                write(bytes(ref.offset - end))
            for piece in pieces(name):
                size = write(piece)
                if tick:
                    tick(size)
            end = file.tell()
            assert end == ref.end, f"{path.name}: {name} ends at {end}, laid out to {ref.end}"
    return FileRecord(end, digest.hexdigest())


def stream_weights(
    path: Path,
    weights: Sequence[Weight],
    checkpoint: Checkpoint,
    *,
    tick: Callable[[int], None] | None = None,
) -> FileRecord:
    """Writes what a graph declares from a checkpoint; memory stays at a few pieces of 16 MiB.

    ExportError if a value does not fit the wanted dtype; OSError if the disk is full or fails.
    """
    declared = {weight.name: weight for weight in weights}

    def pieces(name: str) -> Iterator[Piece]:
        weight = declared[name]
        for source in weight.sources:
            yield from _from_tensor(weight, checkpoint.tensors[source])

    return write_data(path, lay_out(weights), pieces, tick)


def _from_tensor(weight: Weight, tensor: Tensor) -> Iterator[Piece]:
    if weight.negated_exp:
        values = np.exp(tensor.numpy().astype(np.float64))
        yield np.negative(values).astype(np.float32)
        return
    converted = convert_chunks(tensor, weight.dtype, chunk_bytes=PIECE_BYTES)
    if not weight.transposed:
        yield from converted
        return
    item = f"V{stored_bytes(weight.dtype, 1)}"
    elements = np.frombuffer(b"".join(map(bytes, converted)), item)
    yield elements.reshape(-1, weight.shape[0]).T.tobytes()


def widen_data(source: Path, target: Path, refs: Mapping[str, WeightRef]) -> dict[str, WeightRef]:
    """Copies weights into a data file: half precision as float32, all else as it is.

    `refs` points into `source`; returns where the weights lie in the new file.
    """
    data = np.memmap(source, dtype=np.uint8, mode="r")
    ordered = sorted(refs.items(), key=lambda item: item[1].offset)
    places = place(
        (name, "float32" if ref.half_precision else ref.dtype, ref.shape) for name, ref in ordered
    )

    def pieces(name: str) -> Iterator[Piece]:
        ref = refs[name]
        if ref.half_precision:
            return float32_pieces(data, ref)
        return raw_pieces(data, ref)

    write_data(target, places, pieces)
    return places


def convert_chunks(tensor: Tensor, dtype: str, *, chunk_bytes: int) -> Iterator[Piece]:
    """The tensor's elements in order as little-endian `dtype`.

    Each piece stands for at most `chunk_bytes` of the source, one element at least. ExportError if
    a finite value is too large for float16.
    """
    chunks = tensor.chunks(chunk_bytes)
    if tensor.dtype == dtype:
        yield from chunks
        return
    for raw in chunks:
        values = to_float32(raw, tensor.dtype)
        converted = to_stored(values, dtype)
        if dtype == "float16" and (np.isinf(converted) & np.isfinite(values)).any():
            raise _overflow(tensor, chain([raw], chunks))
        yield converted


def _overflow(tensor: Tensor, chunks: Iterable[npt.NDArray[np.uint8]]) -> ExportError:
    """Names the largest magnitude of all that is left to read: it decides what to do."""
    largest = 0.0
    for raw in chunks:
        values = to_float32(raw, tensor.dtype)
        largest = max(largest, float(np.abs(values[np.isfinite(values)]).max(initial=0)))
    return ExportError(
        f"tensor {tensor.name} does not fit float16",
        found=f"a value of magnitude {largest:g}; float16 ends at 65504",
        do="export with --dtype bfloat16 (same size) or float32",
    )
