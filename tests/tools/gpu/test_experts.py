"""The experts' section over the stand-ins: right is taken for right, a wrong row is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.kernel_stand_in import write_kernels
from tools.gpu.experts import Layer, published
from twotower.kernels import ExpertFormats
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.experts import ExpertCode

SMALL = {"hidden": 64, "width": 96, "experts": 8, "top": 3, "shared_intermediate": 192}


class HostTorch:
    """torch, whose current stream is one of the stand-in's."""

    def __init__(self, cuda: Cuda) -> None:
        stream = cuda.create_stream()
        self.cuda = SimpleNamespace(
            current_stream=lambda: SimpleNamespace(cuda_stream=stream),
            synchronize=lambda: cuda.synchronize(stream),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("form", ("bfloat16", "int4"))
def test_a_layer_is_right_and_its_rows_alone_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(CudaStandIn, "device_of", lambda *_: None)  # torch's memory is the host's
    shape = replace(published(form), **SMALL)
    api = CudaStandIn()
    cuda = Cuda(api)
    code = ExpertCode(write_kernels(tmp_path / "k", shape), cuda, 0)
    layer = Layer(HostTorch(cuda), shape, device="cpu")
    case = layer.case(7)
    assert ((case.shares != 0).sum(0) == 3).all()
    layer.bound(code, case)()
    layer.torch.cuda.synchronize()
    wanted = layer.expected(case)
    assert (case.out.float() - wanted).norm() < 1e-2 * wanted.norm()
    assert (layer.dense(case) - wanted).norm() < 1e-2 * wanted.norm()
    assert layer.rows_alone(code, case, range(7))
    case.out[3] *= 1.5
    assert not layer.rows_alone(code, case, range(7))


def test_bytes_are_those_of_the_experts_that_were_chosen() -> None:
    layer = Layer(torch, replace(published("bfloat16"), **SMALL), device="cpu")
    case = layer.case(2)
    case.shares[:] = 0
    case.shares[5] = 1
    assert layer.bytes_read(case) == 2 * (2 * 64 * 96 + 2 * 64 * 192)


def test_the_published_layer() -> None:
    assert published("bfloat16").weights == ExpertFormats()
    assert published("int4").shared == 2
