"""Towers as programs with experts between them: the references' tokens on any devices."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import copy_of
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.goldens import (
    AR,
    DIFFUSION,
    check_goldens,
    golden_cases,
)
from tests.helpers.quantized import TINY, quantized
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import build_fake_engines, open_fake
from tests.runtime.engines.test_trt_engine import LAYOUTS
from twotower import GenerationConfig
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.bundle import Bundle, ExpertsStep, engine_folder, load_engine_record
from twotower.errors import DeviceError, EngineMismatchError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.runtime import TwoTower
from twotower.spec import CONTEXT, DENOISER

WHERE = {
    "one device": LAYOUTS["one device"],
    "plain launches": LAYOUTS["plain launches"],
    "two devices": LAYOUTS["two devices"],
    "three devices": {"devices": (2, 0, 1), "seed": 6},
    "four devices": {"devices": (0, 1, 2, 3), "seed": 5},
}


@pytest.fixture
def cut(built: Any) -> Bundle:
    return built(experts="kernels")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "layout"),
    [*product(["hybrid-a"], WHERE), *product(["hybrid-b"], ["plain launches", "four devices"])],
)
def test_the_goldens(opened: Any, folder: str, layout: str) -> None:
    with opened(folder, experts="kernels", **WHERE[layout]) as it:
        check_goldens(it.model, golden_cases(folder))
        assert {name.partition("-")[0] for name in it.cuda.launched} >= {"up", "down", "combine"}


def test_the_record_is_one_list_of_steps(cut: Bundle) -> None:
    record = load_engine_record(cut, "rtx")
    for graph in (CONTEXT, DENOISER):
        experts = [isinstance(step, ExpertsStep) for step in record.steps[graph]]
        assert experts == [False, *[True, False] * cut.config.pattern.count("E")]
        names = [w.name for part in record.engines[graph] for w in part.weights]
        assert not [name for name in names if "experts" in name]
    (code,) = {step.code for steps in record.experts.values() for step in steps}
    files = {part.file for parts in record.engines.values() for part in parts}
    assert set(record.files) - files == {
        f"{code}/{file.name}" for file in (engine_folder(cut, "rtx") / code).iterdir()
    }
    assert f"{code}/manifest.json" in record.files


@pytest.mark.slow
def test_equal_programs_are_one_file_loaded_once(
    built: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three equal pieces of the pattern, each with weights and states of its own."""
    loaded: list[int] = []
    load = FakeTensorRT._engine
    monkeypatch.setattr(
        FakeTensorRT,
        "_engine",
        lambda trt, data, log: loaded.append(len(data)) or load(trt, data, log),
    )
    bundle = built(TINY, experts="kernels")  # M*EM*EM*E
    record = load_engine_record(bundle, "rtx")
    files = [part.file for part in record.engines[DENOISER]]
    assert len(files) == 4
    assert files[1] == files[2]
    assert len(set(files)) == 3
    prompt = np.arange(5, 60).tolist()
    texts = []
    for made, where in ((TINY, {}), (bundle, {}), (bundle, WHERE["four devices"])):
        loaded.clear()
        with opened(made, **where) as it:
            texts.append([it.model.generate(prompt, how).tokens for how in (DIFFUSION, AR)])
        if where is not WHERE["four devices"] and made is bundle:
            assert len(loaded) == len({p.file for parts in record.engines.values() for p in parts})
    assert texts[0] == texts[1] == texts[2]


@pytest.fixture(scope="module")
def float_tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(
        Checkpoint.open(TINY), tmp_path_factory.mktemp("tiny") / "bundle", ExportConfig()
    )


@pytest.mark.trained
@pytest.mark.parametrize("recipe", ["int4-experts", "int8-weights", "nvfp4-experts"])
def test_experts_in_few_bits_are_read_from_the_bundle(
    float_tiny: Bundle, opened: Any, tmp_path: Path, recipe: str
) -> None:
    """No program holds them; the text is that of ONNX Runtime, which computes all experts."""
    bundle = quantized(float_tiny.path, tmp_path, recipe)
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"), config=BuildConfig(dialect="standard"))
    build_fake_engines(bundle, experts="kernels")
    record = load_engine_record(bundle, "rtx")
    parts = [part for parts in record.engines.values() for part in parts]
    assert not [name for part in parts for name in part.constants if "experts" in name]
    assert all(step.formats["up"] for step in record.experts[DENOISER])
    prompts = ["12 + 7 =", "The capital"]
    options = GenerationConfig(max_new_tokens=24, ignore_eos=True)
    with TwoTower.open(bundle.path, "ort-cpu") as model:
        expected = [out.tokens for out in model.generate(prompts, options)]
    with opened(bundle) as it:
        assert [out.tokens for out in it.model.generate(prompts, options)] == expected


def test_a_damaged_kernel_is_refused(cut: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_of(cut, tmp_path / "bundle"))
    file = next(engine_folder(bundle, "rtx").glob("experts-*/up-block.*.cubin"))
    file.write_bytes(b"?" * file.stat().st_size)
    api = FakeCuda(sm=89)
    with pytest.raises(EngineMismatchError, match="does not fit") as error:
        open_fake(bundle, FakeTensorRT(api), gpus=())
    assert file.name in error.value.found
    assert not api.leaked


@pytest.mark.parametrize("call", ["cuLibraryLoadData", "cuLaunchKernel"])
def test_a_driver_that_refuses_leaves_nothing(
    cut: Bundle, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    api = FakeCuda(sm=89)
    monkeypatch.setattr(
        api, call, lambda *args: (700, 0) if call == "cuLibraryLoadData" else (700,)
    )
    with pytest.raises(DeviceError, match=r"kernel|cuLaunchKernel"), ExitStack() as stack:
        towers = open_fake(cut, FakeTensorRT(api), gpus=(), graphs=False)
        stack.enter_context(TwoTower.from_towers(towers)).generate([5, 6, 7], DIFFUSION)
    assert not api.leaked
    assert not api.loaded
