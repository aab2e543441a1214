"""Weights on their way from a float bundle into few bits: read from mapped files, rounded in pieces on all cores, written once."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.bundle import GRAPH_FILES, Bundle, FileRecord
from twotower.calibration.rounding import Array, expand_rows, global_scale, pack, quantize_rows
from twotower.config.formats import WeightFormat
from twotower.errors import BundleError
from twotower.processors import usable_cores
from twotower.weights.conversion import read_weight
from twotower.weights.declared import Weight, lay_out
from twotower.weights.refs import WeightRef

__all__ = ["Source", "rounding_error", "stream_quantized"]

_PIECE = (
    1 << 20
)  # weights a worker rounds at a time: small enough for its temporaries to stay near the core
_COPY = 16 << 20

Source = tuple[Path, Mapping[str, WeightRef]]
"""A data file and where the weights lie in it."""


def stream_quantized(
    path: Path,
    weights: Sequence[Weight],
    source: Source,
    dtype: str,
    *,
    rounding: str,
    tick: Callable[[int], None] | None = None,
) -> FileRecord:
    """Writes a data file front to back and hashes it on the way.

    Args:
        path: The file.
        weights: What a graph declares: parts of quantized weights, and weights that stay as they
            are.
        source: The float graph's weights.
        dtype: The graph's element type.
        rounding: One of `ROUNDINGS`.
        tick: Called with the bytes of each piece written.

    Raises:
        OSError: the disk is full or fails.
        BundleError: a weight is not finite.
    """
    refs = lay_out(weights)
    data = np.memmap(source[0], dtype=np.uint8, mode="r")
    digest = hashlib.sha256()
    kept: dict[str, Array] = {}
    with path.open("wb") as file, ThreadPoolExecutor(usable_cores()) as pool:
        for weight in weights:
            padding = bytes(refs[weight.name].offset - file.tell())
            for piece in _with(
                padding,
                _pieces(weight, (data, source[1]), dtype, rounding=rounding, pool=pool, kept=kept),
            ):
                digest.update(piece)
                file.write(piece)
                if tick:
                    tick(len(memoryview(piece).cast("B")))
        size = file.tell()
    return FileRecord(size, digest.hexdigest())


def rounding_error(
    bundle: Bundle, name: str, how: WeightFormat, *, rounding: str, rows: int = 256
) -> float:
    """Relative error (root of the sums of squares) of a sample of a weight's rows, evenly taken, in a format."""
    graph = next(graph for graph in GRAPH_FILES if name in bundle.weights(graph))
    data = np.memmap(bundle.data_file(graph), dtype=np.uint8, mode="r")
    ref = bundle.weights(graph)[name]
    count = math.prod(ref.shape[:-1])
    sample = np.concatenate(
        [_read(data, ref, first, 1) for first in range(0, count, max(count // rows, 1))]
    )
    shared = (
        global_scale(float(np.abs(sample).max()), how, bundle.dtype) if how.scale_dtype else None
    )
    values, scales = quantize_rows(sample, how, bundle.dtype, rounding=rounding, shared=shared)
    difference = expand_rows(values, scales, shared) - sample
    return float(np.sqrt(np.square(difference).sum() / max(float(np.square(sample).sum()), 1e-30)))


def _with(padding: bytes, pieces: Iterable[Any]) -> Iterator[Any]:
    if padding:
        yield padding
    yield from pieces


def _pieces(
    weight: Weight,
    source: tuple[npt.NDArray[np.uint8], Mapping[str, WeightRef]],
    dtype: str,
    *,
    rounding: str,
    pool: ThreadPoolExecutor,
    kept: dict[str, Array],
) -> Iterator[Any]:
    data, refs = source
    if weight.part in ("scale", "global_scale"):
        yield np.ascontiguousarray(kept.pop(weight.name)).reshape(-1).view(np.uint8)
        return
    if weight.part == "":
        yield from _copied(data, _rows_of(refs[_stored_name(weight)], weight.rows))
        return
    assert weight.format is not None
    how, ref = weight.format, _rows_of(refs[weight.origin], weight.rows)
    columns = ref.shape[-1]
    count = math.prod(ref.shape[:-1])
    step = max(_PIECE // columns, 1)
    shared = None
    if how.scale_dtype:
        greatest = max(
            pool.map(
                lambda first: _greatest(_read(data, ref, first, step), weight),
                range(0, count, step),
            )
        )
        shared = kept[f"{weight.name}.global_scale"] = global_scale(greatest, how, dtype)
    scales: list[Array] = []

    def rounded(first: int) -> tuple[npt.NDArray[np.uint8], Array]:
        rows = _read(data, ref, first, step)
        _greatest(rows, weight)
        values, scale = quantize_rows(rows, how, dtype, rounding=rounding, shared=shared)
        return pack(values, how.dtype), scale

    for packed, scale in _in_order(pool, rounded, range(0, count, step)):
        scales.append(scale)
        yield packed
    kept[f"{weight.name}.scale"] = np.concatenate(scales)


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[int], Any], items: Iterable[int]
) -> Iterator[Any]:
    """Results in order, with no more than two pieces a worker under way: a map of the pool would hold a whole tensor's."""
    waiting: deque[Future[Any]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 2 * (usable_cores()):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _stored_name(weight: Weight) -> str:
    """The name under which the float bundle stores it: rows that were split off lie in the whole weight."""
    return weight.sources[0] if weight.rows is not None else weight.name


def _rows_of(ref: WeightRef, rows: tuple[int, int] | None) -> WeightRef:
    if rows is None:
        return ref
    row_bytes = ref.nbytes // ref.shape[0]
    return WeightRef(
        ref.dtype, (rows[1] - rows[0], *ref.shape[1:]), ref.offset + rows[0] * row_bytes
    )


def _copied(data: npt.NDArray[np.uint8], ref: WeightRef) -> Iterator[npt.NDArray[np.uint8]]:
    end = ref.offset + ref.nbytes
    for first in range(ref.offset, end, _COPY):
        yield np.asarray(data[first : min(first + _COPY, end)])


def _read(
    data: npt.NDArray[np.uint8], ref: WeightRef, first: int, step: int
) -> npt.NDArray[np.float32]:
    """Rows [first, first+step) of a matrix, stacked ones counted through, as float32."""
    columns, count = ref.shape[-1], math.prod(ref.shape[:-1])
    rows = min(step, count - first)
    row_bytes = ref.nbytes // count
    return np.asarray(
        read_weight(data, WeightRef(ref.dtype, (rows, columns), ref.offset + first * row_bytes)),
        dtype=np.float32,
    )


def _greatest(rows: npt.NDArray[np.float32], weight: Weight) -> float:
    greatest = float(np.abs(rows).max(initial=0.0))
    if not math.isfinite(greatest):
        raise BundleError(
            f"weight {weight.origin} is not finite",
            found="NaN or infinity among its values",
            do="check the checkpoint: a model with such a weight computes nothing of use",
        )
    return greatest
