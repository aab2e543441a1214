"""The table of a data file: name, type, shape and place of every weight, for readers without ONNX.

context/model.onnx           the graph
context/model.onnx.data      its weights, one after another
context/model.onnx.weights.json   this table, a weight a line
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from twotower.dtypes import DTYPES
from twotower.errors import BundleError
from twotower.weights.refs import LINE, WeightRef

TABLE_SUFFIX = ".weights.json"
"""The table of a graph's weights lies beside it under the graph's name plus this."""


def write_weight_table(path: Path, weights: Mapping[str, WeightRef]) -> None:
    """Writes a table in the order of the data file, one weight a line.

    The whole file is the same for every checkpoint of one shape and dtype.
    """
    ordered = sorted(weights.items(), key=lambda item: item[1].offset)
    lines = [json.dumps([name, ref.dtype, list(ref.shape), ref.offset]) for name, ref in ordered]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def read_weight_table(path: Path, data_bytes: int) -> Mapping[str, WeightRef]:
    """Reads a table, in the order of the data file, and holds it against that file's size.

    BundleError if it cannot be read, or names bytes the data file does not have.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        table = {str(name): _ref(rest) for name, *rest in entries}
    except (OSError, ValueError, TypeError) as e:
        found = f"{type(e).__name__}: {e}"
        raise BundleError(f"cannot read {path}", found=found, do=_AGAIN) from e
    problems = []
    end = 0
    for name, ref in sorted(table.items(), key=lambda item: item[1].offset):
        if ref.offset % LINE:
            problems.append(f"{name} starts at byte {ref.offset}, which is no multiple of {LINE}")
        if ref.offset < end:
            problems.append(f"{name} overlaps the weight before it")
        if ref.end > data_bytes:
            problems.append(f"{name} ends at byte {ref.end}, the data file has {data_bytes}")
        end = max(end, ref.end)
    if len(table) < len(entries):
        problems.append("a name stands twice")
    if problems:
        what = f"the weights in {path} are not where the data file has room for them"
        raise BundleError(
            what,
            found="; ".join(problems[:5]),
            do=_AGAIN,
        )
    return MappingProxyType(table)


_AGAIN = "copy the bundle again from where it was made, or export the checkpoint again"


def _ref(entry: list[Any]) -> WeightRef:
    dtype, shape, offset = entry
    if dtype not in DTYPES:
        raise ValueError(f"unknown type {dtype!r}")
    sizes = tuple(shape)
    if any(type(n) is not int or n < 0 for n in (*sizes, offset)):
        raise ValueError(f"shape {shape!r}, offset {offset!r}")
    return WeightRef(dtype, sizes, offset)
