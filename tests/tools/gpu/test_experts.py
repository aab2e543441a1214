"""The experts' section over the fakes: right is taken for right, a wrong row is seen."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.fake_kernels import write_kernels
from tools.gpu import experts
from tools.gpu.expert_cubins import FORMS, compile_layers, published
from tools.gpu.experts import ARCHIVE, FOLDER, Layer, code_folder, measured
from tools.gpu.questions import Given
from twotower.doctor import SkipSectionError
from twotower.kernels import ExpertFormats
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.kernel_experts import ExpertCode

SMALL = {"hidden": 64, "width": 96, "experts": 8, "top": 3, "shared_intermediate": 192}


class HostTorch:
    """torch, whose current stream is one of the fake's."""

    def __init__(self, cuda: Cuda) -> None:
        stream = cuda.create_stream()
        self.cuda = SimpleNamespace(
            current_stream=lambda: SimpleNamespace(cuda_stream=stream),
            synchronize=lambda: cuda.synchronize(stream),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small layer over the fake, and its kernels; a pass takes 2 ms."""
    monkeypatch.setattr(FakeCuda, "device_of", lambda *_: None)  # torch's memory is the host's
    monkeypatch.setattr(experts, "captured", lambda _, run: SimpleNamespace(replay=run))
    monkeypatch.setattr(experts, "median_ms", lambda _, run: (run(), 2.0)[1])

    def made(form: str = "bfloat16") -> tuple[Layer, ExpertCode]:
        shape = replace(published(form), **SMALL)
        cuda = Cuda(FakeCuda())
        code = ExpertCode(write_kernels(tmp_path / "k", shape).folder, cuda, 0)
        return Layer(HostTorch(cuda), shape, device="cpu"), code

    return made


@pytest.mark.parametrize("form", ("bfloat16", "int4"))
def test_a_layer_is_right_and_its_rows_alone_are_the_same(make: Any, form: str) -> None:
    layer, code = make(form)
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


def test_a_row_tells_errors_and_shares_of_a_copy(make: Any) -> None:
    row = measured(*make(), 40, 1e-3)
    launched, replayed, alone, chosen, ms, rate, share, dense_ms, ratio = row
    assert 0 < launched < 1e-2 and 0 < replayed < 1e-2 and alone is True
    assert (chosen, ms, dense_ms, ratio) == (8, 2.0, 2.0, 1.0)
    weights = 2 * (8 * 2 * 64 * 96 + 2 * 64 * 192)
    assert rate == pytest.approx(weights / 2e6, rel=1e-3)
    assert share == pytest.approx(rate / 1e-3, rel=1e-3), "a copy's bytes are read and written"


def test_wrong_kernels_are_said_to_be_wrong(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Layer.expected
    monkeypatch.setattr(Layer, "expected", lambda self, case: 1.1 * expected(self, case))
    launched, replayed, *_ = measured(*make(), 3, 1.0)
    assert str(launched).startswith("WRONG 9") and str(replayed).startswith("WRONG 9")


def test_kernels_of_the_pack_are_taken_where_they_are_for_this_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in FORMS:
        write_kernels(tmp_path / FOLDER / form, replace(published(form), **SMALL), (90,))
    (tmp_path / "call1").mkdir()
    with tarfile.open(tmp_path / "call1" / ARCHIVE, "w:xz") as packed:
        packed.add(tmp_path / FOLDER, FOLDER)
    given = Given(name="experts", pack=(tmp_path / "call1",), work=tmp_path / "work")
    assert code_folder(given, 90) == (tmp_path / "work" / FOLDER, "elsewhere")
    made: list[Any] = []
    monkeypatch.setattr(experts, "compile_layers", lambda *words: made.append(words))
    assert code_folder(given, 89)[1] == "here: none were brought for SM 89"
    assert made == [(tmp_path / "work" / FOLDER, [89])]
    monkeypatch.setattr(experts, "compile_layers", compile_layers)
    monkeypatch.setattr("twotower.extras.find_spec", lambda name: None)
    with pytest.raises(SkipSectionError, match="not installed: triton"):
        code_folder(given, 89)


def test_bytes_are_those_of_the_experts_that_were_chosen() -> None:
    layer = Layer(torch, replace(published("bfloat16"), **SMALL), device="cpu")
    case = layer.case(2)
    case.shares[:] = 0
    case.shares[5] = 1
    assert layer.bytes_read(case) == 2 * (2 * 64 * 96 + 2 * 64 * 192)
    assert published("bfloat16").weights == ExpertFormats()
    assert published("int4").shared == 2
