"""Integer weights as ONNX Runtime's own operators read them: unsigned, with the middle for zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twotower.weights.refs import WeightRef, aligned

__all__ = ["unsigned_data", "unsigned_pieces"]

_FLIPPED = {"int4": 0x88, "int8": 0x80}
"""The sign bits of a byte: turned over, -8 is 0 and 0 is 8."""

_PER_BYTE = {"int4": 2, "int8": 1}
_PIECE = 16 << 20


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
    for first in range(ref.offset, ref.end, _PIECE):
        yield data[first : min(first + _PIECE, ref.end)] ^ np.uint8(_FLIPPED[ref.dtype])
