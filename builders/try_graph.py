"""Whether a graph builds, as an exit code: the check of `polygraphy debug reduce`.

    python -m twotower.builders.try_graph GRAPH --target rtx --sm 89

0: it builds. 1: the library refuses it, or crashes over it; the reason is on stderr. 3: it cannot
be tried (no graph, an input of unknown type or rank). Weights are read from beside the graph.
`--job` takes the shapes and options of a build that failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from twotower.builders.base import silent
from twotower.builders.trt.make_engine import RefusedError, run_job
from twotower.dtypes import dtype_of_onnx, onnx_code
from twotower.errors import TwoTowerError
from twotower.weights.external import load_graph

BUILDS, REFUSED, NOT_TRIED = 0, 1, 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m twotower.builders.try_graph", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "graph", type=Path, metavar="GRAPH", help="an ONNX file; its weights may lie beside it"
    )
    parser.add_argument(
        "--target", default="rtx", choices=("rtx", "trt"), help="the library (default: %(default)s)"
    )
    parser.add_argument(
        "--sm",
        default="",
        metavar="LIST",
        help="of rtx: compute capabilities, e.g. 86,89 (default: those of --job, or 89)",
    )
    parser.add_argument(
        "--axes",
        default="",
        metavar="LIST",
        help="sizes of dynamic axes, e.g. B=8,L=256 (default: those of --job, or 1)",
    )
    parser.add_argument(
        "--job",
        type=Path,
        metavar="FILE",
        help="job.json of a failed build: its shapes, type and compute capabilities",
    )
    args = parser.parse_args(argv)
    axes: dict[str, tuple[int, int, int]] = {}
    try:
        given = json.loads(args.job.read_text(encoding="utf-8")) if args.job else {}
        for pair in filter(None, args.axes.split(",")):
            name, size = pair.split("=")
            axes[name] = (int(size),) * 3
        job = job_of_graph(
            load_graph(args.graph),
            args.target,
            given,
            axes=axes,
        )
        if args.sm and args.target == "rtx":
            job["sms"] = [int(sm) for sm in args.sm.split(",")]
    except (OSError, ValueError, KeyError, DecodeError) as e:
        sys.stderr.write(f"{args.graph} cannot be tried: {e}\n")
        return NOT_TRIED
    return _tried(args.graph, job)


def job_of_graph(
    graph: onnx.ModelProto,
    target: str,
    given: Mapping[str, Any],
    *,
    axes: Mapping[str, tuple[int, int, int]],
) -> dict[str, Any]:
    """A job for the graph as it is, or as a part of the graph `given` speaks of.

    Dynamic axes of a part are all 1: equal ones cannot be told by name. Raises ValueError without
    nodes, or for an input without type or rank.
    """
    if not graph.graph.node:
        raise ValueError("it has no nodes")
    inputs = [_input(value) for value in graph.graph.input]
    job = {
        "dtype": _product_type(graph),
        "timing_cache": None,
        "sms": [89] if target == "rtx" else [],
        **given,
        "target": target,
    }
    # The graph that was built has its own inputs, and weights of constant shape besides.
    built = given.get("inputs")
    weights = [i for i in inputs if built is not None and i not in built]
    fixed = all(not isinstance(axis, str) for _, _, axes in weights for axis in axes)
    if not axes and built is not None and fixed and len(inputs) - len(weights) == len(built):
        return job
    letters = {axis for _, _, shape in inputs for axis in shape if isinstance(axis, str)}
    known = {**(job["profiles"][0]["axes"] if job.get("profiles") else {}), **axes}
    if letters - known.keys():
        known = {letter: axes.get(letter, (1, 1, 1)) for letter in letters}
    profile = {"name": "whole", "axes": {letter: list(known[letter]) for letter in letters}}
    return {**job, "inputs": inputs, "profiles": [profile] if letters else []}


def _tried(graph: Path, job: dict[str, Any]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        places = {
            "graph": str(graph),
            "beside": str(graph.absolute()),
            "output": str(Path(scratch) / "out.engine"),
        }
        try:
            run_job({**job, **places}, Path(scratch), tick=silent)
        except RefusedError as e:
            sys.stderr.write(f"{e.what}\n  found: {e.found}\n")
            return REFUSED
        except TwoTowerError as e:
            sys.stderr.write(f"{e}\n")
            return NOT_TRIED
    return BUILDS


def _input(value: onnx.ValueInfoProto) -> list[Any]:
    """Name, type and axes of a graph's input; an axis without a name gets one."""
    tensor = value.type.tensor_type
    dtype = dtype_of_onnx(tensor.elem_type)
    if dtype is None or not tensor.HasField("shape"):
        raise ValueError(f"input {value.name!r} has no type or rank this check knows")
    axes: list[int | str] = []
    for i, dim in enumerate(tensor.shape.dim):
        name = dim.dim_param or f"{value.name}.{i}"
        axes.append(dim.dim_value if dim.HasField("dim_value") else name)
    return [value.name, dtype, axes]


def _product_type(graph: onnx.ModelProto) -> str:
    """The element type of the graph's products, as far as its weights show it."""
    kinds = {t.data_type for t in graph.graph.initializer}
    kinds |= {v.type.tensor_type.elem_type for v in graph.graph.input}
    return next((name for name in ("float16", "bfloat16") if onnx_code(name) in kinds), "float32")


if __name__ == "__main__":
    sys.exit(main())
