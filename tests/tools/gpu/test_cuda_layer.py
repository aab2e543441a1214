"""The CUDA layer writes recorded tokens with torch as its engine, over the fake for CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import fake_kernels
from tools.gpu.counted import CountedCuda
from tools.gpu.cuda_layer import Case, tokens_of_case, torch_bundle
from tools.gpu.torch_engine import TorchTensorRT
from tools.gpu.torch_operators import OPERATORS
from twotower.bundle import GRAPH_FILES
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.model import parse_model_config
from twotower.export.graphs.tower_graphs import build_graph


def test_torch_computes_every_operator_of_the_graphs() -> None:
    config = parse_model_config(PUBLISHED_CONFIG, "the published config")
    graphs = [
        build_graph(graph, config, dtype)
        for graph in GRAPH_FILES
        for dtype in ("float32", "bfloat16")
    ]
    used = {node.op_type for made in graphs for node in made.model.graph}
    assert used <= set(OPERATORS)
    assert len(used) > 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case("hybrid-a", 3), Case("hybrid-b"), Case("hybrid-b", experts="kernels")],
    ids=lambda c: c.name,
)
def test_recorded_tokens_are_written(tmp_path: Path, case: Case) -> None:
    bundle = torch_bundle(case, tmp_path / "bundle", fake_kernels)
    for graphs in (True, False):
        api = FakeCuda(sm=90)
        trt, cuda = TorchTensorRT("cpu", api), CountedCuda(api)
        facts = tokens_of_case(bundle, case, trt, cuda=cuda, graphs=graphs, most=1)
        assert facts["right"] is True, facts
        assert facts["refused"] == []
        assert cuda.made == cuda.begun
        assert (cuda.made > 0) == graphs
        assert bool(api.launched) == (case.experts == "kernels")
        assert not api.leaked


@pytest.mark.slow
def test_a_wrong_engine_is_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.gpu import torch_operators

    case = Case("hybrid-b")
    bundle = torch_bundle(case, tmp_path / "bundle")
    api = FakeCuda()
    monkeypatch.setitem(torch_operators.OPERATORS, "Sigmoid", lambda a, x: x * 0)
    facts = tokens_of_case(
        bundle, case, TorchTensorRT("cpu", api), cuda=CountedCuda(api), graphs=False, most=1
    )
    assert facts["right"] is False
