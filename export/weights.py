"""Weights on their way from the checkpoint into a graph's data file: laid out first, then streamed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from twotower.bundle import DATA_SUFFIX, TABLE_SUFFIX, FileRecord, write_weight_table
from twotower.checkpoint.reader import Checkpoint
from twotower.config.formats import stored_bytes
from twotower.config.weights import WeightRef, aligned
from twotower.export.conversion import convert_chunks
from twotower.export.graphs import TowerGraph, Weight

__all__ = ["lay_out", "point_to_data", "save_graph", "save_program", "stream_weights"]

_CHUNK = 16 << 20


def lay_out(weights: Sequence[Weight]) -> dict[str, WeightRef]:
    """Aligned places in one data file, in declaration order: a reader that runs the layers in turn reads forward."""
    out: dict[str, WeightRef] = {}
    end = 0
    for weight in weights:
        out[weight.name] = WeightRef(weight.dtype, weight.shape, aligned(end, weight.nbytes))
        end = out[weight.name].offset + weight.nbytes
    return out


def point_to_data(model: ir.Model, refs: dict[str, WeightRef], location: str) -> None:
    """Gives every declared weight of a recorded graph its place in the data file `location` (relative to the graph's file)."""
    for name, ref in refs.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.ExternalTensor(
            location, ref.offset, ref.nbytes, value.const_value.dtype, shape=ir.Shape(ref.shape), name=name
        )


def save_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph whose weights lie outside; what an initializer says of itself is not said a second time."""
    proto = ir.to_proto(model)
    named = {tensor.name for tensor in proto.graph.initializer}
    left = [value for value in proto.graph.value_info if value.name not in named]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(left)
    path.write_bytes(proto.SerializeToString())


def save_program(path: Path, graph: TowerGraph, refs: dict[str, WeightRef]) -> None:
    """Writes a graph and the table of its weights, which lie or will lie in a data file beside it."""
    point_to_data(graph.model, refs, path.name + DATA_SUFFIX)
    save_graph(graph.model, path)
    write_weight_table(path.with_name(path.name + TABLE_SUFFIX), refs)


def stream_weights(
    path: Path, weights: Sequence[Weight], checkpoint: Checkpoint, *, tick: Callable[[int], None] | None = None
) -> FileRecord:
    """Writes a data file front to back and hashes it on the way.

    Memory stays at a few chunks of 16 MiB whatever the model. `tick` gets the bytes of each piece written.

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
                # Hashing and writing both release the interpreter: the two run side by side on two cores.
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
            yield np.negative(np.exp(tensor.numpy().astype(np.float64))).astype(np.float32).tobytes()
        elif weight.transposed:
            pieces = convert_chunks(tensor, weight.dtype, chunk_bytes=_CHUNK)
            item = f"V{stored_bytes(weight.dtype, 1)}"
            elements = np.frombuffer(b"".join(map(bytes, pieces)), item)
            yield elements.reshape(-1, weight.shape[0]).T.tobytes()
        else:
            yield from convert_chunks(tensor, weight.dtype, chunk_bytes=_CHUNK)
