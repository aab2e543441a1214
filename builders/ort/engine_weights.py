"""Weights of an engine of ONNX Runtime: which it reads from the bundle, and which are rewritten.

For a CPU half precision is widened to float32 and 4-bit floats are expanded; integers that products
read as they are stored (`quantized_products`) become unsigned, with a scale for each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from twotower.builders.ort.cpu_graph import float4_weights
from twotower.builders.ort.quantized_products import UNSIGNED, quantized_products
from twotower.dtypes import stored_bytes
from twotower.files import FileRecord
from twotower.weights.external import weight_refs
from twotower.weights.mapped import PIECE_BYTES, float32_pieces, raw_pieces, read_weight
from twotower.weights.refs import WeightRef, place
from twotower.weights.writer import Piece, write_data

_ELEMENTS = PIECE_BYTES // 4

_SIGN_BITS = {"int4": 0x88, "int8": 0x80}
"""Of the elements in a byte: turned over, -8 is 0 and 0 is 8."""


@dataclass(frozen=True, slots=True)
class EngineWeight:
    """A weight of a bundle's graph, and what an engine makes of it.

    Attributes:
        stored: The type the engine's own file has it in; empty where it stays in the bundle.
        scales: Of 4-bit floats: places of the block scales and the global scale.
        repeats: Of scales: blocks of a product that one of them is for.
        dropped: Whether it is a scale of 4-bit floats, which the engine does not need.
    """

    ref: WeightRef
    stored: str = ""
    scales: tuple[WeightRef, WeightRef] | None = None
    repeats: int = 1
    blocks: tuple[int, ...] = ()
    dropped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the engine."""
        return self.blocks or self.ref.shape

    @property
    def written(self) -> int:
        """Bytes the engine's own file takes for it."""
        if not self.stored:
            return 0
        return stored_bytes(self.stored, math.prod(self.shape))

    def pieces(self, data: npt.NDArray[np.uint8]) -> Iterable[Piece]:
        """Its contents in the engine's own file, made from the bundle's data."""
        if self.scales is not None:
            return self._expanded_float4(data, *self.scales)
        if self.blocks:
            return self._repeated_scales(data)
        if self.stored in UNSIGNED.values():
            sign_bits = np.uint8(_SIGN_BITS[self.ref.dtype])
            return (piece ^ sign_bits for piece in raw_pieces(data, self.ref))
        return float32_pieces(data, self.ref)

    def _expanded_float4(
        self, data: npt.NDArray[np.uint8], block_scales: WeightRef, global_scale: WeightRef
    ) -> Iterator[Piece]:
        shared = np.float32(read_weight(data, global_scale))
        groups = block_scales.shape[-1]
        rows = max(_ELEMENTS // self.ref.shape[-1], 1)
        for values, scales in zip(
            self.ref.split(rows),
            block_scales.split(rows),
            strict=True,
        ):
            # What two DequantizeLinear do: the scale is a product of its own, rounded, before it
            # meets the values.
            scale = read_weight(data, scales).astype(np.float32) * shared
            grouped = read_weight(data, values).reshape(
                len(scale),
                groups,
                -1,
            )
            yield grouped.astype(np.float32) * scale[..., None]

    def _repeated_scales(self, data: npt.NDArray[np.uint8]) -> Iterator[Piece]:
        """A scale for every block of a row; the last of a row may be for fewer than the others."""
        *rows, blocks = self.blocks
        scales = replace(self.ref, shape=(math.prod(rows), -(-blocks // self.repeats)))
        for part in scales.split(max(_ELEMENTS // blocks, 1)):
            values = np.asarray(read_weight(data, part), np.float32)
            yield np.ascontiguousarray(np.repeat(values, self.repeats, axis=-1)[:, :blocks])


def cpu_weights(
    model: onnx.ModelProto, *, as_stored: bool = False, even_rows: bool = False
) -> dict[str, EngineWeight]:
    """What becomes of every weight of a graph in an engine for a CPU.

    `as_stored`: products read quantized integers as stored. `even_rows`: passes always have an even
    number of rows, see `quantized_products`.
    """
    refs = weight_refs(model)
    out = {}
    for name, ref in refs.items():
        out[name] = EngineWeight(ref, "float32" if ref.half_precision else "")
    for values, _, *scales in float4_weights(model):
        block_scales, global_scale = scales
        out[values] = EngineWeight(
            refs[values], "float32", scales=(refs[block_scales], refs[global_scale])
        )
        for scale in scales:
            out[scale] = EngineWeight(refs[scale], dropped=True)
    products = quantized_products(model, refs, even_rows=even_rows) if as_stored else {}
    for weight, product in products.items():
        ref = refs[weight]
        blocks = (*ref.shape[:-1], ref.shape[-1] // product.block)
        out[weight] = EngineWeight(ref, UNSIGNED[ref.dtype])
        out[product.scales] = EngineWeight(
            refs[product.scales], "float32", repeats=product.repeats, blocks=blocks
        )
    return out


def write_engine_data(
    source: Path,
    target: Path,
    weights: Mapping[str, EngineWeight],
    tick: Callable[[int], None] | None = None,
) -> tuple[dict[str, WeightRef], FileRecord]:
    """Writes the engine's own weights; their places, and the file's size and hash."""
    data = np.memmap(source, dtype=np.uint8, mode="r")
    ordered = sorted(weights.items(), key=lambda item: item[1].ref.offset)
    places = place((name, w.stored, w.shape) for name, w in ordered if w.stored)
    record = write_data(
        target,
        places,
        lambda name: weights[name].pieces(data),
        tick,
    )
    return places, record
