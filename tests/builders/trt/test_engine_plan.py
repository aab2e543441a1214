"""The key of an engine; products in float32 written as sums compute the same, no others change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.graph_runs import random_inputs, run_graph
from twotower.builders.trt import engine_plan
from twotower.builders.trt.engine_plan import engine_key, sum_float32_products
from twotower.bundle import Bundle
from twotower.graph_lint import lint
from twotower.graph_lint.view import GraphView
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.weights.external import load_graph


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_fixture("hybrid-a", tmp_path_factory.mktemp("sums") / "float16", "float16")


def products(model: onnx.ModelProto) -> Counter[str | None]:
    """Matrix products by element type."""
    view, nodes = GraphView(model), model.graph.node
    return Counter(view.dtype(node.output[0]) for node in nodes if node.op_type == "MatMul")


@pytest.mark.parametrize("graph", [CONTEXT, CONTEXT_HEAD, DENOISER])
def test_every_product_of_a_float32_graph_can_be_a_sum(hybrid_a: Bundle, graph: str) -> None:
    model = load_graph(hybrid_a.graph_file(graph))
    count = products(model).total()
    folder = hybrid_a.graph_file(graph).parent
    given = random_inputs(hybrid_a.signatures[graph].inputs, hybrid_a.config.vocab_size)
    before = run_graph(model, folder, given)
    assert sum_float32_products(model) == count > 0
    assert "MatMul" not in {node.op_type for node in model.graph.node}
    after = run_graph(model, folder, given)
    assert after.keys() == before.keys()
    for name, one in before.items():
        other = after[name]
        # Sums of at most some hundred products in another order: a few units in the last place.
        np.testing.assert_allclose(
            other, one, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(one).max()))
        )


@pytest.mark.parametrize("graph", [CONTEXT, CONTEXT_HEAD, DENOISER])
def test_products_in_half_precision_stay(half: Bundle, graph: str) -> None:
    model = load_graph(half.graph_file(graph))
    types, before = products(model), model.SerializeToString()
    assert types["float16"] > 0
    assert sum_float32_products(model) == types["float32"]
    assert products(model) == {"float16": types["float16"]}
    assert (
        (types["float32"] == 0) == (model.SerializeToString() == before) == (graph == CONTEXT_HEAD)
    )
    assert [f.rule.id for f in lint(model) if f.rule.severity.value == "error"] == []


L4 = {"name": "NVIDIA L4", "sm": 89, "driver": "580.1"}
JOB: dict[str, Any] = {
    "target": "rtx",
    "dtype": "float16",
    "inputs": [["tokens", "int64", ["B", "L"]]],
    "profiles": [{"name": "decode", "axes": {"B": [1, 8, 8], "L": [1, 1, 1]}}],
    "sms": [86, 89],
    "timing_cache": None,
}
LIBRARY = {"name": "tensorrt_rtx", "version": "1.7.1"}


def key(model: bytes = b"g", **changes: Any) -> str:
    given = {"holds": "w", "library": LIBRARY, "gpu": None}
    given |= {name: changes.pop(name) for name in given.keys() & changes.keys()}
    return engine_key({**JOB, **changes}, model, **given)


def test_whatever_changes_an_engine_changes_its_key_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profiles = [{"name": "decode", "axes": {"B": [1, 4, 8], "L": [1, 1, 1]}}]
    others = [
        key(b"other"),
        key(holds="other"),
        key(library={**LIBRARY, "version": "1.7.2"}),
        key(dtype="bfloat16"),
        key(inputs=[["tokens", "int64", ["B", 1]]]),
        key(profiles=profiles),
        key(sms=[86]),
        key(gpu=L4),
        key(gpu={**L4, "driver": "590.1"}),
        key(gpu={**L4, "sm": 90}),
        key(gpu={**L4, "name": "NVIDIA L40"}),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert len(key()) == 32
    assert key(target="other", timing_cache="elsewhere") == key()
    assert key(library={"version": "1.7.1", "name": "tensorrt_rtx"}) == key()
    before = key()
    monkeypatch.setitem(engine_plan.SETTINGS, "cleared_flags", [])
    assert key() != before
