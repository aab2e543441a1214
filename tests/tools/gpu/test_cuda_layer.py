"""The CUDA layer writes recorded tokens with torch as its engine, over the stand-in for CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cuda_stand_in import CudaStandIn
from tools.gpu.cuda_layer import Case, CountedCuda, tokens_of_case, torch_bundle
from tools.gpu.torch_engine import TorchTensorRT


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case("hybrid-a", 3), Case("hybrid-b")], ids=lambda c: c.name)
def test_recorded_tokens_are_written(tmp_path: Path, case: Case) -> None:
    bundle = torch_bundle(case, tmp_path / "bundle")
    for graphs in (True, False):
        api = CudaStandIn()
        trt, cuda = TorchTensorRT("cpu", api), CountedCuda(api)
        facts = tokens_of_case(bundle, case, trt, cuda=cuda, graphs=graphs, most=1)
        assert facts["right"] is True, facts
        assert facts["refused"] == []
        assert cuda.made == cuda.begun
        assert (cuda.made > 0) == graphs
        assert not api.leaked


def test_a_wrong_engine_is_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.gpu import torch_operators

    case = Case("hybrid-b")
    bundle = torch_bundle(case, tmp_path / "bundle")
    api = CudaStandIn()
    monkeypatch.setitem(torch_operators.OPERATORS, "Sigmoid", lambda a, x: x * 0)
    facts = tokens_of_case(
        bundle, case, TorchTensorRT("cpu", api), cuda=CountedCuda(api), graphs=False, most=1
    )
    assert facts["right"] is False
