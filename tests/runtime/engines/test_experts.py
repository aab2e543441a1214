"""Towers as programs with experts between them: the references' tokens on any devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import copy_of
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.quantized import TINY, quantized
from tests.helpers.towers import golden_config
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import build_fake_engines, open_fake
from tests.runtime.engines.test_trt_engine import AR, DIFFUSION, LAYOUTS, golden_cases
from twotower import GenerationConfig
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.bundle import Bundle, ExpertsStep, engine_folder, load_engine_record
from twotower.errors import DeviceError, EngineMismatchError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.runtime import Request, TwoTower
from twotower.spec import CONTEXT, DENOISER

WHERE = {
    "one device": LAYOUTS["one device"],
    "plain launches": LAYOUTS["plain launches"],
    "two devices": LAYOUTS["two devices"],
    "three devices": {"devices": (2, 0, 1), "seed": 6},
    "four devices": {"devices": (0, 1, 2, 3), "seed": 5},
}


@pytest.fixture
def cut(built: Callable[..., Any]) -> Callable[[str], Bundle]:
    return lambda folder: built(folder, experts="kernels")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "layout"),
    [
        *(("hybrid-a", layout) for layout in WHERE),
        ("hybrid-b", "plain launches"),
        ("hybrid-b", "four devices"),
    ],
)
def test_the_goldens(
    cut: Callable[[str], Bundle], opened: Callable[..., Any], folder: str, layout: str
) -> None:
    cases = golden_cases(folder)
    with opened(cut(folder), **WHERE[layout]) as it:
        for case in cases:
            out = it.model.generate(case["prompt"], golden_config(case))
            assert (list(out.tokens), out.usage.nfe) == (case["diffusion_tokens"], case["nfe"])
            assert list(it.model.generate(case["prompt"], AR).tokens) == case["ar_greedy_tokens"]
        together = it.model.generate([Request(c["prompt"], golden_config(c)) for c in cases])
        assert [list(out.tokens) for out in together] == [c["diffusion_tokens"] for c in cases]
        assert {name.partition("-")[0] for name in it.cuda.launched} >= {"up", "down", "combine"}


def test_the_record_is_one_list_of_steps(cut: Callable[[str], Bundle]) -> None:
    bundle = cut("hybrid-a")
    record = load_engine_record(bundle, "rtx")
    for graph in (CONTEXT, DENOISER):
        kinds = [
            "experts" if isinstance(step, ExpertsStep) else "program"
            for step in record.steps[graph]
        ]
        assert kinds == ["program", *["experts", "program"] * bundle.config.pattern.count("E")]
        assert not [
            w.name for part in record.engines[graph] for w in part.weights if "experts" in w.name
        ]
    (code,) = {step.code for steps in record.experts.values() for step in steps}
    files = {part.file for parts in record.engines.values() for part in parts}
    assert set(record.files) - files == {
        f"{code}/{file.name}" for file in (engine_folder(bundle, "rtx") / code).iterdir()
    }
    assert f"{code}/manifest.json" in record.files


@pytest.mark.slow
def test_equal_programs_are_one_file_loaded_once(
    built: Callable[..., Any], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
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
    with opened(built(TINY)) as it:
        expected = [it.model.generate(prompt, options).tokens for options in (DIFFUSION, AR)]
    loaded.clear()
    with opened(bundle) as it:
        assert len(loaded) == len(
            {part.file for parts in record.engines.values() for part in parts}
        )
        assert [
            it.model.generate(prompt, options).tokens for options in (DIFFUSION, AR)
        ] == expected
    with opened(bundle, devices=(0, 1, 2, 3), seed=3) as it:
        assert [
            it.model.generate(prompt, options).tokens for options in (DIFFUSION, AR)
        ] == expected


@pytest.fixture(scope="module")
def float_tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(
        Checkpoint.open(TINY), tmp_path_factory.mktemp("tiny") / "bundle", ExportConfig()
    )


@pytest.mark.trained
@pytest.mark.parametrize("recipe", ["int4-experts", "int8-weights", "nvfp4-experts"])
def test_experts_in_few_bits_are_read_from_the_bundle(
    float_tiny: Bundle, opened: Callable[..., Any], tmp_path: Path, recipe: str
) -> None:
    """No program holds them; the text is that of ONNX Runtime, which computes all experts."""
    bundle = quantized(float_tiny.path, tmp_path, recipe)
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"), config=BuildConfig(dialect="standard"))
    build_fake_engines(bundle, experts="kernels")
    record = load_engine_record(bundle, "rtx")
    assert not [
        name
        for parts in record.engines.values()
        for part in parts
        for name in part.constants
        if "experts" in name
    ]
    assert all(step.formats["up"] for step in record.experts[DENOISER])
    prompts = ["12 + 7 =", "The capital"]
    options = GenerationConfig(max_new_tokens=24, ignore_eos=True)
    with TwoTower.open(bundle.path, "ort-cpu") as model:
        expected = [out.tokens for out in model.generate(prompts, options)]
    with opened(bundle) as it:
        assert [out.tokens for out in it.model.generate(prompts, options)] == expected


def test_a_step_is_one_launch_and_sets_nothing(
    cut: Callable[[str], Bundle], opened: Callable[..., Any]
) -> None:
    """Programs and experts are captured together: once warm, neither is enqueued again."""
    options = GenerationConfig(
        max_new_tokens=64, confidence_threshold=1.0, steps_per_block=16, ignore_eos=True
    )
    marks: list[tuple[int, ...]] = []
    with opened(cut("hybrid-a")) as it:

        def on_step(record: Any) -> None:
            counts = it.cuda.counts
            made = counts["cudaMalloc"] + counts["cudaHostAlloc"]
            marks.append(
                (
                    it.trt.changes,
                    made,
                    counts["cudaGraphLaunch"],
                    it.trt.executions,
                    len(it.cuda.launched),
                )
            )

        it.model.generate([5, 6, 7], options, on_step=on_step)
        steady = np.diff(np.array(marks[33:48]), axis=0)
        assert (steady == [0, 0, 1, 0, 0]).all(), steady
        assert all(p.replayed for p in it.model._workspaces._idle._denoiser.values())


def test_rows_are_independent(cut: Callable[[str], Bundle], opened: Callable[..., Any]) -> None:
    prompts = [np.random.default_rng(n).integers(4, 250, n).tolist() for n in (1, 17, 90)]
    with opened(cut("hybrid-a"), **LAYOUTS["two devices"]) as it:
        alone = [it.model.generate(p, DIFFUSION).tokens for p in prompts]
        assert [out.tokens for out in it.model.generate(prompts, DIFFUSION)] == alone


def test_a_refused_program_surfaces_and_the_session_goes_on(
    cut: Callable[[str], Bundle], opened: Callable[..., Any]
) -> None:
    case = golden_cases("hybrid-a")[0]
    with opened(cut("hybrid-a"), graphs=False) as it:
        it.trt.refuse_at = 5
        with pytest.raises(DeviceError, match="was not run"):
            it.model.generate(case["prompt"], golden_config(case))
        assert (
            list(it.model.generate(case["prompt"], golden_config(case)).tokens)
            == case["diffusion_tokens"]
        )


def test_kernels_for_another_gpu_are_refused(cut: Callable[[str], Bundle]) -> None:
    api = FakeCuda(sm=120)
    with pytest.raises(EngineMismatchError, match="SM 120"):
        open_fake(cut("hybrid-a"), FakeTensorRT(api), gpus=())
    assert not api.leaked


def test_a_damaged_kernel_is_refused(cut: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = Bundle.open(copy_of(cut("hybrid-a"), tmp_path / "bundle"))
    file = next(engine_folder(bundle, "rtx").glob("experts-*/up-block.*.cubin"))
    file.write_bytes(b"?" * file.stat().st_size)
    api = FakeCuda(sm=89)
    with pytest.raises(EngineMismatchError, match="does not fit") as error:
        open_fake(bundle, FakeTensorRT(api), gpus=())
    assert file.name in error.value.found
    assert not api.leaked


@pytest.mark.parametrize("call", ["cuLibraryLoadData", "cuLaunchKernel"])
def test_a_driver_that_refuses_leaves_nothing(
    cut: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    api = FakeCuda(sm=89)
    monkeypatch.setattr(
        api, call, lambda *args: (700, 0) if call == "cuLibraryLoadData" else (700,)
    )
    with pytest.raises(DeviceError, match=r"kernel|cuLaunchKernel"), ExitStack() as stack:
        towers = open_fake(cut("hybrid-a"), FakeTensorRT(api), gpus=(), graphs=False)
        stack.enter_context(TwoTower.from_towers(towers)).generate([5, 6, 7], DIFFUSION)
    assert not api.leaked
    assert not api.loaded
