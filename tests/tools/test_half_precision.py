"""Half precision on a CPU: every result is rounded once; the trained model keeps its text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.helpers.bundles import export_fixture
from tools.agreement import measure_agreement
from tools.half_precision import MOVES, RoundingBuilder, round_results
from twotower.builders import build_engines
from twotower.bundle import GRAPH_FILES, engine_folder
from twotower.errors import BuildError
from twotower.evaluate.suite import load_suite
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.runtime import TwoTower
from twotower.weights.external import load_graph

ROOT = Path(__file__).parents[2]
CODES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def chain(dtype: str) -> onnx.ModelProto:
    """(x + y) - x: what is left of y depends on whether the sum was rounded."""
    nodes = [
        helper.make_node("Add", ["x", "y"], ["sum"]),
        helper.make_node("Sub", ["sum", "x"], ["out"]),
    ]
    values = [helper.make_tensor_value_info(name, CODES[dtype], [1]) for name in ("x", "y", "out")]
    graph = helper.make_graph(nodes, "chain", values[:2], values[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def run_in_float32(model: onnx.ModelProto, x: float, y: float) -> float:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return float(session.run(None, {"x": np.float32([x]), "y": np.float32([y])})[0][0])


@pytest.mark.parametrize(("dtype", "x"), [("float16", 2048.0), ("bfloat16", 256.0)])
def test_a_result_inside_a_chain_is_rounded(dtype: str, x: float) -> None:
    """1 is half a step at x: rounding to even loses it, where ONNX Runtime by itself keeps it."""
    model = chain(dtype)
    assert round_results(model, dtype) == {"Add": 1, "Sub": 1}
    assert run_in_float32(model, x, 1.0) == 0.0
    assert run_in_float32(model, x, 3.0) == 4.0
    if dtype == "float16":
        assert run_in_float32(model, 65504.0, 65504.0) == float("inf"), "overflow"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_every_narrow_result_of_the_towers_is_rounded(
    tmp_path: Path, folder: str, dtype: str
) -> None:
    bundle = export_fixture(folder, tmp_path / "b", dtype)
    record = build_engines(bundle, "ort-cpu", RoundingBuilder())
    for name in GRAPH_FILES:
        model = load_graph(engine_folder(bundle, "ort-cpu") / f"{name}.onnx")
        exported = onnx.shape_inference.infer_shapes(load_graph(bundle.graph_file(name))).graph
        types = {v.name: v.type.tensor_type.elem_type for v in exported.value_info}
        made_by = {out: node for node in model.graph.node for out in node.output}
        computed = [n for n in exported.node if n.op_type not in MOVES]
        narrow = [out for node in computed for out in node.output if types.get(out) == CODES[dtype]]
        assert narrow
        assert sum(record.report["rounded"][name].values()) >= len(narrow)
        for out in narrow:
            assert made_by[out].op_type == "Cast"
            assert made_by[out].input[0] == f"{out}/narrow"


def test_a_wide_bundle_has_nothing_to_round(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no narrow type"):
        build_engines(export_fixture("hybrid-a", tmp_path / "b"), "ort-cpu", RoundingBuilder())


@pytest.mark.slow
def test_float16_writes_what_float32_writes(tiny_bundle: Path, tmp_path: Path) -> None:
    """60 prompts, spread over the kinds: of all 624, `make fp16-check` asks for 99 %."""
    narrow = export_bundle(
        Checkpoint.open(ROOT / "assets" / "twotower-tiny"),
        tmp_path / "b",
        ExportConfig(dtype="float16"),
    )
    build_engines(narrow, "ort-cpu", RoundingBuilder())
    suite = load_suite()
    problems = suite.only(limit=-(-60 // len(suite.kinds))).problems[:60]
    with (
        TwoTower.open(tiny_bundle, target="ort-cpu") as reference,
        TwoTower.open(narrow.path, target="ort-cpu") as rounded,
    ):
        diffusion, ar = measure_agreement(reference, rounded, problems)
    assert (diffusion.mode, ar.mode) == ("diffusion", "ar")
    assert diffusion.prompts == len(problems) == 60
    assert len(diffusion.divergences) <= 1, "one of 60 can be unlucky; two would be 97 %"
    assert len(ar.divergences) <= 1


def test_a_difference_is_named_with_its_place(tiny_bundle: Path) -> None:
    problems = load_suite().only(limit=1).problems[:2]

    class Other:
        def __init__(self, model: TwoTower) -> None:
            self._model = model

        def generate(self, prompts: object, config: object) -> list[object]:
            first, *rest = self._model.generate(prompts, config)  # type: ignore[call-overload]
            return [replace(first, tokens=(*first.tokens[:2], 7, *first.tokens[3:])), *rest]

    with TwoTower.open(tiny_bundle, target="ort-cpu") as model:
        for result in measure_agreement(model, Other(model), problems):  # type: ignore[arg-type]
            assert result.percent == 50.0
            (divergence,) = result.divergences
            assert (divergence.problem, divergence.token) == (problems[0].id, 2)
