"""Towers as programs with experts between them, on stand-ins: the references' tokens on any number of devices, replayed and plain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.stand_ins import GPUS
from tests.helpers.tensorrt_stand_in import TensorRTStandIn
from tests.helpers.towers import golden_config
from tests.runtime.engines.test_tensorrt_engine import AR, DIFFUSION, LAYOUTS, golden_cases
from twotower import GenerationConfig
from twotower.bundle import Bundle, ExpertsStep, load_engine_record
from twotower.errors import DeviceError, EngineMismatchError
from twotower.flavour import flavour_from_module
from twotower.runtime import Request
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.tensorrt_open import TensorRTOptions, open_tensorrt
from twotower.spec import CONTEXT, DENOISER

MORE = {
    "three devices": {"devices": (2, 0, 1), "seed": 6},
    "four devices": {"devices": (0, 1, 2, 3)},
    "four devices in random order": {"devices": (0, 1, 2, 3), "seed": 5},
}


@pytest.fixture
def cut(built: Callable[..., Any]) -> Callable[[str], Bundle]:
    return lambda folder: built(folder, experts="kernels")


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE])
@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_the_goldens(cut: Callable[[str], Bundle], opened: Callable[..., Any], folder: str, layout: str) -> None:
    cases = golden_cases(folder)
    with opened(cut(folder), **(LAYOUTS | MORE)[layout]) as it:
        for case in cases:
            out = it.model.generate(case["prompt"], golden_config(case))
            assert (list(out.tokens), out.usage.nfe) == (case["diffusion_tokens"], case["nfe"])
            assert list(it.model.generate(case["prompt"], AR).tokens) == case["ar_greedy_tokens"]
        together = it.model.generate([Request(c["prompt"], golden_config(c)) for c in cases])
        assert [list(out.tokens) for out in together] == [c["diffusion_tokens"] for c in cases]
        assert set(it.experts.runs) == {i for i, kind in enumerate(it.towers.config.pattern) if kind == "E"}
    assert it.experts.closed


def test_the_record_is_one_list_of_steps(cut: Callable[[str], Bundle]) -> None:
    bundle = cut("hybrid-a")
    record = load_engine_record(bundle, "rtx")
    for graph in (CONTEXT, DENOISER):
        kinds = ["experts" if isinstance(step, ExpertsStep) else "program" for step in record.steps[graph]]
        assert kinds == ["program", *["experts", "program"] * bundle.config.pattern.count("E")]
        assert not [w.name for part in record.engines[graph] for w in part.weights if "experts" in w.name]
    assert set(record.files) == {part.file for parts in record.engines.values() for part in parts}


def test_equal_programs_are_one_file_loaded_once(
    built: Callable[..., Any], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three equal pieces of the pattern, each with weights and states of its own."""
    loaded: list[int] = []
    load = TensorRTStandIn._engine
    monkeypatch.setattr(TensorRTStandIn, "_engine", lambda trt, data, log: loaded.append(len(data)) or load(trt, data, log))
    source = Path(__file__).parents[3] / "assets" / "twotower-tiny"  # M*EM*EM*E
    bundle = built(source, experts="kernels")
    record = load_engine_record(bundle, "rtx")
    files = [part.file for part in record.engines[DENOISER]]
    assert len(files) == 4
    assert files[1] == files[2]
    assert len(set(files)) == 3
    prompt = np.arange(5, 60).tolist()
    with opened(built(source)) as it:
        expected = [it.model.generate(prompt, options).tokens for options in (DIFFUSION, AR)]
    loaded.clear()
    with opened(bundle) as it:
        assert len(loaded) == len(record.files)
        assert [it.model.generate(prompt, options).tokens for options in (DIFFUSION, AR)] == expected
    with opened(bundle, devices=(0, 1, 2, 3), seed=3) as it:
        assert [it.model.generate(prompt, options).tokens for options in (DIFFUSION, AR)] == expected


def test_a_step_is_one_launch_and_sets_nothing(cut: Callable[[str], Bundle], opened: Callable[..., Any]) -> None:
    """Programs and experts are captured together: once warm, neither is enqueued again."""
    options = GenerationConfig(max_new_tokens=64, confidence_threshold=1.0, steps_per_block=16, ignore_eos=True)
    marks: list[tuple[int, ...]] = []
    with opened(cut("hybrid-a")) as it:

        def on_step(record: Any) -> None:
            counts = it.cuda.counts
            made = counts["cudaMalloc"] + counts["cudaHostAlloc"]
            marks.append((it.trt.changes, made, counts["cudaGraphLaunch"], it.trt.executions, len(it.experts.runs)))

        it.model.generate([5, 6, 7], options, on_step=on_step)
        steady = np.diff(np.array(marks[33:48]), axis=0)
        assert (steady == [0, 0, 1, 0, 0]).all(), steady
        assert all(p.replayed for p in it.model._workspaces._idle._denoiser.values())


@pytest.mark.parametrize("layout", ["one device", "two devices"])
def test_rows_are_independent(cut: Callable[[str], Bundle], opened: Callable[..., Any], layout: str) -> None:
    prompts = [np.random.default_rng(n).integers(4, 250, n).tolist() for n in (1, 17, 90, 200)]
    with opened(cut("hybrid-a"), **LAYOUTS[layout]) as it:
        alone = [it.model.generate(p, DIFFUSION).tokens for p in prompts]
        assert [out.tokens for out in it.model.generate(prompts, DIFFUSION)] == alone


def test_a_refused_program_surfaces_and_the_session_goes_on(cut: Callable[[str], Bundle], opened: Callable[..., Any]) -> None:
    case = golden_cases("hybrid-a")[0]
    with opened(cut("hybrid-a"), graphs=False) as it:
        it.trt.refuse_at = 5
        with pytest.raises(DeviceError, match="was not run"):
            it.model.generate(case["prompt"], golden_config(case))
        assert list(it.model.generate(case["prompt"], golden_config(case)).tokens) == case["diffusion_tokens"]


def test_programs_are_not_opened_where_nothing_computes_their_experts(cut: Callable[[str], Bundle]) -> None:
    api = CudaStandIn()
    with pytest.raises(EngineMismatchError, match="nothing here computes the experts"):
        open_tensorrt(cut("hybrid-a"), flavour_from_module(TensorRTStandIn(api)), Cuda(api), TensorRTOptions(gpus=GPUS))
    assert not api.leaked
