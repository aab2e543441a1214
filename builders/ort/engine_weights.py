"""Weights for ONNX Runtime on a CPU: which it reads as they are, and the others written anew into a file of the engine.

Those of half width are widened to float32, 4-bit floats expanded; integers that products read as
they are stored (`few_bits`) become unsigned, with a scale for each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from twotower.builders.ort.few_bits import UNSIGNED, stored_products
from twotower.dtypes import stored_bytes
from twotower.weights.conversion import read_weight
from twotower.weights.external import weight_refs
from twotower.weights.refs import WeightRef, aligned

__all__ = [
    "Place",
    "expand_data",
    "expand_float4",
    "hide_dequantization",
    "places_of",
    "show_dequantization",
    "unsigned_data",
    "unsigned_pieces",
]

_PIECE = 4 << 20  # elements at a time


@dataclass(frozen=True, slots=True)
class Place:
    """A weight of a bundle's graph, and what an engine for a CPU makes of it.

    Attributes:
        ref: Where it lies in the bundle's data file.
        stored: The type the engine's own file has it in; empty where it stays in the bundle or is
            not needed any more.
        scales: Of 4-bit floats: places of the block scales and the global scale.
        dropped: Whether it is a scale of such a weight, and goes with it.
        repeated: Of scales with a place for each block: how many one of them is for, and their
            shape then.
    """

    ref: WeightRef
    stored: str = ""
    scales: tuple[WeightRef, WeightRef] | None = None
    dropped: bool = False
    repeated: tuple[int, tuple[int, ...]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the engine."""
        return self.repeated[1] if self.repeated else self.ref.shape

    @property
    def written(self) -> int:
        """Bytes the engine's own file takes for it."""
        return stored_bytes(self.stored, math.prod(self.shape)) if self.stored else 0


def places_of(
    model: onnx.ModelProto,
    *,
    as_stored: bool = False,
    even_rows: bool = False,
) -> dict[str, Place]:
    """What becomes of every weight of a graph as it lies in a bundle.

    Args:
        model: The graph as it was recorded.
        as_stored: Whether products read integers in few bits as they are stored.
        even_rows: Whether the graph's passes always have an even number of rows, see `few_bits`.
    """
    refs = weight_refs(model)
    scales = {values: names for values, _, *names in _float4_weights(model)}
    dropped = {name for names in scales.values() for name in names}
    products = stored_products(model, refs, even_rows=even_rows) if as_stored else {}
    out = {}
    for name, ref in refs.items():
        if name in dropped:
            out[name] = Place(ref, dropped=True)
        elif name in scales:
            block, whole = scales[name]
            out[name] = Place(ref, "float32", (refs[block], refs[whole]))
        elif name in products:
            out[name] = Place(ref, UNSIGNED[ref.dtype])
        else:
            out[name] = Place(ref, "float32" if ref.narrow else "")
    for weight, product in products.items():
        *rows, columns = refs[weight].shape
        out[product.scales] = Place(
            refs[product.scales],
            "float32",
            repeated=(product.repeats, (*rows, columns // product.block)),
        )
    return out


def expand_float4(model: onnx.ModelProto) -> None:
    """Takes the reading of 4-bit floats out of a graph, in place: the weight is float32 and read directly."""
    gone: set[str] = set()
    for values, output, *scales in _float4_weights(model):
        tensor = next(t for t in model.graph.initializer if t.name == values)
        tensor.data_type = onnx.TensorProto.FLOAT
        gone |= {output, *scales}
        for node in model.graph.node:
            if output in node.input:
                node.input[:] = [values if name == output else name for name in node.input]
    gone |= {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in gone
    }
    kept = [node for node in model.graph.node if node.output[0] not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    left = [t for t in model.graph.initializer if t.name not in gone]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)


def hide_dequantization(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Makes graph inputs of quantized weights as their products read them, in place, so that an optimiser sees products of floats.

    ONNX Runtime's own passes would move the transpose of a weight in front of its DequantizeLinear,
    and to do so quantize the whole weight once more in every pass; and they would not fuse that
    transpose into the product.

    Returns:
        The operators that were taken out, for `show_dequantization`.
    """
    refs = weight_refs(model)
    hidden = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in refs
    ]
    kept = [node for node in model.graph.node if node not in hidden]
    gone = {name for node in hidden for name in node.input}
    left = [t for t in model.graph.initializer if t.name not in gone]
    for node in hidden:
        shape = list(refs[node.input[0]].shape)
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, shape)
        )
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(left)
    return hidden


def show_dequantization(model: onnx.ModelProto, hidden: Sequence[onnx.NodeProto]) -> None:
    """Puts the operators back, each right before its first reader: a weight is expanded when it is needed and no earlier."""
    waiting = {node.output[0]: node for node in hidden}
    inputs = [value for value in model.graph.input if value.name not in waiting]
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += [waiting.pop(name) for name in node.input if name in waiting]
        nodes.append(node)
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(inputs)


def expand_data(
    source: Path, target: Path, places: Mapping[str, Place], tick: Callable[[int], None]
) -> dict[str, WeightRef]:
    """Writes what an engine keeps itself, in pieces; `tick` gets the bytes of each.

    Returns:
        Where the weights lie in the new file.
    """
    data = np.memmap(source, dtype=np.uint8, mode="r")
    out: dict[str, WeightRef] = {}
    end = 0
    with target.open("wb") as file:
        for name, place in sorted(places.items(), key=lambda item: item[1].ref.offset):
            if not place.written:
                continue
            out[name] = WeightRef(place.stored, place.shape, aligned(end, place.written))
            file.seek(out[name].offset)
            for piece in _pieces(data, place):
                piece.tofile(file)
                tick(piece.nbytes)
            end = out[name].offset + place.written
    return out


def _pieces(data: npt.NDArray[np.uint8], place: Place) -> Iterator[npt.NDArray[Any]]:
    if place.scales is not None:
        yield from _expanded_float4(data, place.ref, place.scales)
    elif place.repeated is not None:
        yield from _repeated(data, place.ref, *place.repeated)
    elif place.stored in UNSIGNED.values():
        yield from unsigned_pieces(data, place.ref)
    else:
        yield from _widened(data, place.ref)


def _widened(data: npt.NDArray[np.uint8], ref: WeightRef) -> Iterator[npt.NDArray[np.float32]]:
    count = math.prod(ref.shape)
    for first in range(0, count, _PIECE):
        part = WeightRef(
            ref.dtype, (min(_PIECE, count - first),), ref.offset + stored_bytes(ref.dtype, first)
        )
        yield np.asarray(read_weight(data, part), np.float32)


def _repeated(
    data: npt.NDArray[np.uint8],
    ref: WeightRef,
    repeats: int,
    shape: tuple[int, ...],
) -> Iterator[npt.NDArray[np.float32]]:
    """A scale for every block of a row; the last of a row's scales may be for fewer than the others."""
    blocks = shape[-1]
    rows, groups = math.prod(shape[:-1]), -(-blocks // repeats)
    step = max(_PIECE // blocks, 1)
    for first in range(0, rows, step):
        here = min(step, rows - first)
        part = WeightRef(
            ref.dtype, (here, groups), ref.offset + stored_bytes(ref.dtype, first * groups)
        )
        scales = np.asarray(read_weight(data, part), np.float32)
        yield np.ascontiguousarray(np.repeat(scales, repeats, axis=-1)[:, :blocks])


def _expanded_float4(
    data: npt.NDArray[np.uint8],
    ref: WeightRef,
    scales: tuple[WeightRef, WeightRef],
) -> Iterator[npt.NDArray[np.float32]]:
    block, whole = scales
    shared = np.float32(read_weight(data, whole))
    rows, columns, groups = math.prod(ref.shape[:-1]), ref.shape[-1], block.shape[-1]
    step = max(_PIECE // columns, 1)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        values = read_weight(
            data,
            WeightRef(
                ref.dtype, (count, groups, columns // groups), ref.offset + first * columns // 2
            ),
        )
        steps = read_weight(
            data, WeightRef(block.dtype, (count, groups, 1), block.offset + first * groups)
        )
        # What two DequantizeLinear do: the scale is a product of its own, rounded, before it meets
        # the values.
        yield values.astype(np.float32) * (steps.astype(np.float32) * shared)


def _float4_weights(model: onnx.ModelProto) -> Iterator[tuple[str, str, str, str]]:
    """Of every weight in 4-bit floats: its values, the output that reads them, its block scales and its global scale."""
    code: Any = onnx.TensorProto.FLOAT4E2M1
    narrow = {t.name for t in model.graph.initializer if t.data_type == code}
    makers = {
        node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"
    }
    for node in makers.values():
        if node.input[0] in narrow:
            scale = makers[node.input[1]]
            yield node.input[0], node.output[0], scale.input[0], scale.input[1]


_FLIPPED = {"int4": 0x88, "int8": 0x80}
"""The sign bits of a byte: turned over, -8 is 0 and 0 is 8."""

_PER_BYTE = {"int4": 2, "int8": 1}
_UNSIGNED_PIECE = 16 << 20


def unsigned_data(
    source: Path,
    target: Path,
    refs: Mapping[str, WeightRef],
    tick: Callable[[int], None],
) -> dict[str, WeightRef]:
    """Writes signed integers as unsigned ones, 16 MiB at a time.

    Args:
        source: The data file `refs` points into.
        target: The file to write.
        refs: Weights of type `int4` or `int8`; of `int4` with an even last axis.
        tick: Called with the bytes of each piece.

    Returns:
        Where they lie in the new file: `uint8`, of `int4` two in a byte, the first in the low half.
    """
    data = np.memmap(source, dtype=np.uint8, mode="r")
    out: dict[str, WeightRef] = {}
    end = 0
    with target.open("wb") as file:
        for name, ref in sorted(refs.items(), key=lambda item: item[1].offset):
            columns = ref.shape[-1] // _PER_BYTE[ref.dtype]
            place = replace(ref, dtype="uint8", shape=(*ref.shape[:-1], columns), offset=0)
            out[name] = replace(place, offset=aligned(end, place.nbytes))
            file.seek(out[name].offset)
            for piece in unsigned_pieces(data, ref):
                piece.tofile(file)
                tick(piece.nbytes)
            end = out[name].end
    return out


def unsigned_pieces(data: npt.NDArray[np.uint8], ref: WeightRef) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a signed weight, `int4` or `int8`, as unsigned ones, 16 MiB at a time."""
    for first in range(ref.offset, ref.end, _UNSIGNED_PIECE):
        yield data[first : min(first + _UNSIGNED_PIECE, ref.end)] ^ np.uint8(_FLIPPED[ref.dtype])
