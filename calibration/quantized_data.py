"""Data files of quantized weights: read from a float graph's, quantized in pieces on all cores."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.bundle import GRAPH_FILES, Bundle, FileRecord
from twotower.calibration.weight_quantization import (
    Array,
    expand_rows,
    global_scale,
    pack,
    quantize_rows,
)
from twotower.config.formats import WeightFormat
from twotower.errors import BundleError
from twotower.processors import usable_cores
from twotower.weights.declared import Weight, lay_out
from twotower.weights.mapped import raw_pieces, read_weight
from twotower.weights.refs import WeightRef
from twotower.weights.writer import Piece, write_data

_PIECE = 1 << 20
"""Weights a worker quantizes at a time: few enough for its temporaries to stay near the core."""


@dataclass(frozen=True, slots=True)
class FloatWeights:
    """A float graph's weights: data file, places in it, and the dtype, which scales share."""

    path: Path
    refs: Mapping[str, WeightRef]
    dtype: str


def stream_quantized(
    path: Path,
    weights: Sequence[Weight],
    source: FloatWeights,
    *,
    rounding: str,
    tick: Callable[[int], None] | None = None,
) -> FileRecord:
    """Writes a data file of quantized weights and of weights that stay as they are.

    `tick` is called with the bytes of each piece written.

    Raises:
        OSError: the disk is full or fails.
        BundleError: a weight is not finite.
    """
    declared = {weight.name: weight for weight in weights}
    with ThreadPoolExecutor(usable_cores()) as pool:
        quantizer = _Quantizer(source, rounding, pool)
        places = lay_out(weights)
        return write_data(
            path,
            places,
            lambda name: quantizer.pieces(declared[name]),
            tick,
        )


def quantization_error(
    bundle: Bundle, name: str, how: WeightFormat, *, rounding: str, rows: int = 256
) -> float:
    """Relative error of a weight in a format: the root of the sums of squares of sampled rows."""
    graph = next(graph for graph in GRAPH_FILES if name in bundle.weights(graph))
    data = np.memmap(
        bundle.data_file(graph),
        dtype=np.uint8,
        mode="r",
    )
    ref = bundle.weights(graph)[name]
    count = math.prod(ref.shape[:-1])
    starts = range(0, count, max(count // rows, 1))
    sample = np.concatenate([_read(data, ref.rows(first, first + 1)) for first in starts])
    shared = None
    if how.scale_dtype:
        shared = global_scale(
            float(np.abs(sample).max()),
            how,
            bundle.dtype,
        )
    values, scales = quantize_rows(sample, how, bundle.dtype, rounding=rounding, shared=shared)
    lost = np.square(expand_rows(values, scales, shared) - sample).sum()
    return float(np.sqrt(lost / max(float(np.square(sample).sum()), 1e-30)))


class _Quantizer:
    """Makes the contents of a graph's weights in order; scales are kept until their own turn."""

    def __init__(self, source: FloatWeights, rounding: str, pool: ThreadPoolExecutor) -> None:
        self._source, self._rounding, self._pool = source, rounding, pool
        self._data = np.memmap(source.path, dtype=np.uint8, mode="r")
        self._scales: dict[str, Array] = {}

    def pieces(self, weight: Weight) -> Iterator[Piece]:
        if weight.part in ("scale", "global_scale"):
            scales = self._scales.pop(weight.name)
            yield np.ascontiguousarray(scales).reshape(-1).view(np.uint8)
            return
        if weight.rows is None:
            ref = self._source.refs[weight.origin or weight.name]
        else:  # they are split off here, and lie in the whole weight there
            ref = self._source.refs[weight.sources[0]].rows(*weight.rows)
        if weight.format is None:
            yield from raw_pieces(self._data, ref)
        else:
            yield from self._quantized(weight.name, ref, weight.format)

    def _quantized(self, name: str, ref: WeightRef, how: WeightFormat) -> Iterator[Piece]:
        parts = list(ref.split(max(_PIECE // ref.shape[-1], 1)))
        dtype, shared = self._source.dtype, None
        if how.scale_dtype:
            amax = max(self._pool.map(lambda part: _amax(name, _read(self._data, part)), parts))
            shared = self._scales[f"{name}.global_scale"] = global_scale(amax, how, dtype)

        def quantize(part: WeightRef) -> tuple[npt.NDArray[np.uint8], Array]:
            rows = _read(self._data, part)
            _amax(name, rows)
            values, scale = quantize_rows(rows, how, dtype, rounding=self._rounding, shared=shared)
            return pack(values, how.dtype), scale

        scales: list[Array] = []
        for packed, scale in self._in_order(quantize, parts):
            scales.append(scale)
            yield packed
        self._scales[f"{name}.scale"] = np.concatenate(scales)

    def _in_order(
        self, work: Callable[[WeightRef], Any], items: Iterable[WeightRef]
    ) -> Iterator[Any]:
        """Results in order, with two pieces a worker under way: `map` would hold a whole tensor."""
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(self._pool.submit(work, item))
            if len(waiting) > 2 * usable_cores():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _amax(name: str, rows: npt.NDArray[np.float32]) -> float:
    """The greatest magnitude; BundleError where it is not finite."""
    amax = float(np.abs(rows).max(initial=0.0))
    if not math.isfinite(amax):
        raise BundleError(
            f"weight {name} is not finite",
            found="NaN or infinity among its values",
            do="check the checkpoint: a model with such a weight computes nothing of use",
        )
    return amax


def _read(data: npt.NDArray[np.uint8], ref: WeightRef) -> npt.NDArray[np.float32]:
    return np.asarray(read_weight(data, ref), dtype=np.float32)
