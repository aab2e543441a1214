"""A tower with random weights runs as the runtime runs it; kernels are added up by name."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import fake_kernels
from tools.gpu import full_size, passes
from tools.gpu.counted import CountedCuda
from tools.gpu.cuda_layer import Case, torch_bundle
from tools.gpu.kernel_profile import kernel_times, profiled
from tools.gpu.one_tower import OneTower, RandomWeights
from tools.gpu.torch_engine import TorchTensorRT
from twotower.bundle import Bundle
from twotower.doctor import Answers
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.device import HostStream
from twotower.spec import TensorSpec
from twotower.tensorrt_library import variant_from_module


@pytest.fixture(scope="module", params=["kernels", "dense"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    case = Case("hybrid-b", experts=request.param)
    return torch_bundle(case, tmp_path_factory.mktemp("full") / "bundle", fake_kernels)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["denoiser", "context"])
def test_a_tower_is_timed_replayed_and_launched(
    bundle: Bundle, graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_size, "_SECONDS", 0.0)
    monkeypatch.setattr(full_size, "ROWS", (1, 3))
    monkeypatch.setattr(passes, "TOKENS", 100)
    block = {"prefill": 256, "block": bundle.trained_block_size, "decode": 1}
    monkeypatch.setattr(passes, "WIDTHS", block)
    api = FakeCuda(sm=90)
    cuda = CountedCuda(api)
    trt = TorchTensorRT("cpu", api)
    tower = OneTower(bundle, graph, variant_from_module(trt), cuda)
    answers = Answers(tmp_path / "answers.json", 60)
    full_size.measure_tower(answers, tower, graph, cuda)
    tower.close()
    kernels = tower.computed_by == "kernels"
    assert bool(api.launched) == kernels and not api.loaded
    read = bundle.weights(graph)
    assert tower.weights.nbytes == sum(ref.nbytes for ref in read.values())
    assert trt.failures == []
    assert not api.leaked
    table = next(t for t in answers["tables"] if t["title"] == "Passes")
    names = ["denoise"] if graph == "denoiser" else list(block)
    cases = product((tower.computed_by,), ("replayed", "launched"), (1, 3), names)
    assert [(row[0], row[3], row[2], row[1]) for row in table["rows"]] == list(cases)
    for _, name, _, how, ms, in_row, rate, made in table["rows"]:
        assert ms > 0 and in_row > 0
        assert rate == pytest.approx(tower.weights.nbytes / ms / 1e6, rel=1e-3)
        fixed = name != "prefill"  # of any length up to 256: its kernels are not compiled for one
        sets = 1 if name == "denoise" else 2
        assert made == (sets if how == "replayed" and fixed else 0)
    finite = [value for name, value in answers["finite"].items() if "denoise" in name]
    assert finite == [True] * len(finite)
    assert len(finite) == (2 if graph == "denoiser" else 0)
    assert answers["summary"][0].startswith(f"{names[0]}, 1 row, replayed, experts ")


def test_random_weights_are_small_in_either_type() -> None:
    api = FakeCuda()
    cuda = Cuda(api)
    specs = [
        TensorSpec("a", "bfloat16", (333, 7)),
        TensorSpec("b", "float32", (1001,)),
        TensorSpec("c", "bfloat16", (3, 5, 7)),
    ]
    weights = RandomWeights(cuda, specs)
    assert weights.nbytes == 333 * 7 * 2 + 1001 * 4 + 3 * 5 * 7 * 2
    at = {spec.name: weights.address(Path("any"), spec.name, 0) for spec in specs}
    assert all(address % 256 == 0 for address in at.values())
    bits = np.frombuffer(cuda.bytes_at(at["a"], 333 * 7 * 2), np.uint16).astype(np.uint32) << 16
    floats = np.frombuffer(cuda.bytes_at(at["b"], 1001 * 4), np.float32)
    for values in (bits.view(np.float32), floats):
        assert 0.015 < values.std() < 0.025
        assert abs(values.mean()) < 0.005
    weights.close()
    weights.close()
    assert not api.leaked


def test_more_weights_than_are_drawn_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu.one_tower._PERIOD", 512)
    cuda = Cuda(FakeCuda())
    size = 5 * 512 + 256
    weights = RandomWeights(cuda, [TensorSpec("a", "bfloat16", (size // 2,))])
    data = np.frombuffer(cuda.bytes_at(weights.address(Path(), "a", 0), size), np.uint8)
    assert len(np.unique(data[:512])) > 50
    np.testing.assert_array_equal(data, np.resize(data[:512], size))


def test_kernels_are_added_up_by_name() -> None:
    events = [
        {"cat": "kernel", "name": "product", "dur": 5.0},
        {"cat": "kernel", "name": "product", "dur": 7.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "dur": 2.0},
        {"cat": "kernel", "name": "norm", "dur": 4.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 100.0},
        {"name": "process_name", "ph": "M"},
    ]
    times = kernel_times(events, runs=2)
    assert [(t.name, t.launches, t.us) for t in times] == [
        ("product", 1.0, 6.0),
        ("norm", 0.5, 2.0),
        ("Memcpy DtoH", 0.5, 1.0),
    ]


def test_without_a_profiler_there_is_a_reason(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.json", 60)
    profiled(answers, lambda: HostStream.done, name="a pass")
    assert answers["profiles"]["a pass"].startswith("none: torch ")
    assert "tables" not in answers
