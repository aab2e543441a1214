"""Half precision emulated on a CPU: every result is rounded as it is made.

A CPU runs a float16 graph in float32: ONNX Runtime puts casts around the operators it has no such
kernel for, and takes away a cast down that is followed by a cast up, so that a chain of operators
is rounded once at its end. Tokens of such a run say nothing about a GPU. The engine made here is
the float16 (or bfloat16) graph in float32 with one rounding after every operator that computes:
what a GPU does whose products accumulate in float32, fused kernels apart, which round less often.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from twotower.builders import EngineBuilder, builder_for
from twotower.builders.base import BuildConfig, BuildPlan, Report
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle, EngineRecord, FileRecord, hash_file
from twotower.dtypes import onnx_code
from twotower.errors import BuildError
from twotower.weights.external import attach_weights, load_graph, weight_refs, widen_to_float32
from twotower.weights.writer import widen_data

__all__ = ["MOVES", "RoundingBuilder", "round_results"]

TARGET = "ort-cpu"
_HALVES = ("float16", "bfloat16")

MOVES = frozenset(
    {
        *(
            "Concat",
            "Expand",
            "Gather",
            "GatherElements",
            "GatherND",
            "Identity",
            "Relu",
            "Reshape",
            "ScatterElements",
        ),
        *("Slice", "Split", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze", "Where"),
    }
)
"""Operators whose results are some of their inputs: nothing to round."""


class RoundingBuilder:
    """Builds `ort-cpu` engines that round like the bundle's half-precision type."""

    def __init__(self) -> None:
        self._plain: EngineBuilder = builder_for(TARGET)

    def library(self) -> dict[str, str]:
        return self._plain.library()

    def asked(self, bundle: Bundle, config: BuildConfig) -> str:
        return ""

    def plan(self, bundle: Bundle, config: BuildConfig) -> _RoundingPlan:
        return _RoundingPlan(bundle, self._plain.plan(bundle, config), self.library())


class _RoundingPlan:
    def __init__(self, bundle: Bundle, plain: BuildPlan, library: dict[str, str]) -> None:
        self._bundle, self._plain, self._library = bundle, plain, library

    def keeps(self, record: EngineRecord) -> bool:
        return "rounded" in record.report

    def describe(self) -> list[str]:
        return [f"three graphs in float32 that round every result to {self._bundle.dtype}"]

    @property
    def needed_bytes(self) -> int:
        return self._plain.needed_bytes

    def build(self, folder: Path, *, report: Report) -> EngineRecord:
        bundle = self._bundle
        if bundle.dtype not in _HALVES:
            raise BuildError(
                f"bundle '{bundle.path}' has no narrow type to round to",
                found=f"dtype {bundle.dtype}; allowed: {', '.join(_HALVES)}",
                do="export the checkpoint with --dtype float16 or bfloat16",
            )
        started = time.perf_counter()
        rounded: dict[str, dict[str, int]] = {}
        for step, (name, graph) in enumerate(GRAPH_FILES.items()):
            report(f"rounding {name}", step, len(GRAPH_FILES))
            model = load_graph(bundle.graph_file(name))
            data = folder / f"{name}{DATA_SUFFIX}"
            refs = widen_data(bundle.path / (graph + DATA_SUFFIX), data, weight_refs(model))
            rounded[name] = dict(round_results(model, bundle.dtype).most_common())
            attach_weights(model, refs, f"engines/{TARGET}/{data.name}")
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        return EngineRecord(
            target=TARGET,
            library=self._library,
            dtype="float32",
            graphs={name: bundle.program_identity(name) for name in GRAPH_FILES},
            holds={name: bundle.data_identity(name) for name in GRAPH_FILES},
            weights={name: f"engines/{TARGET}/{name}{DATA_SUFFIX}" for name in GRAPH_FILES},
            files={
                p.name: FileRecord(p.stat().st_size, hash_file(p)) for p in sorted(folder.iterdir())
            },
            report={
                "seconds": round(time.perf_counter() - started, 3),
                "rounded": rounded,
                "widened_from": bundle.dtype,
            },
        )


def round_results(model: onnx.ModelProto, dtype: str) -> Counter[str]:
    """Makes a graph compute in float32 and round every result that was of the narrow type, in place.

    Args:
        model: A graph in `dtype`, without its weights' data, which the caller must widen.
        dtype: `float16` or `bfloat16`.

    Returns:
        How many results of each operator are rounded.
    """
    code = onnx_code(dtype)
    narrow = _values_of(model, code)
    widen_to_float32(model)
    count: Counter[str] = Counter()
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type in MOVES:
            continue
        for i, name in enumerate(node.output):
            if name in narrow:
                node.output[i] = f"{name}/exact"
                nodes.append(
                    helper.make_node("Cast", [f"{name}/exact"], [f"{name}/narrow"], to=code)
                )
                nodes.append(
                    helper.make_node("Cast", [f"{name}/narrow"], [name], to=TensorProto.FLOAT)
                )
                count[node.op_type] += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    return count


def _values_of(model: onnx.ModelProto, code: int) -> set[str]:
    """Results of a type.

    Raises:
        BuildError: the type of a result cannot be told.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in (*inferred.graph.value_info, *inferred.graph.output)
    }
    unknown = [
        name for node in model.graph.node for name in node.output if name and not types.get(name)
    ]
    if unknown:
        raise BuildError(
            "the graph has results whose type cannot be told",
            found=", ".join(unknown[:5]),
            do="use the onnx this version asks for",
        )
    return {name for name, kind in types.items() if kind == code}
