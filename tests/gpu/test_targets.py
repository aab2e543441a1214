"""Every target that runs on this GPU writes what the references wrote, alone and in batches.

Tolerances. In float32 (TF32 off) tokens must be equal: the goldens' closest call is 1.5e-4 wide,
and another order of summation moves a logit by about 1e-6. Half-precision engines are held against
the reference output with the limits of twotower.doctor.reference_answer: their tokens may diverge
on a close call, their numbers may differ by what rounding every result costs and a margin.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.goldens import AR, check_golden, check_goldens, check_rows, random_prompt
from tests.helpers.gpu import opened, targets
from tests.helpers.graphs import FIXTURES
from tools.agreement import measure_agreement
from twotower import GenerationConfig
from twotower.bundle import Bundle
from twotower.doctor.checks import check_bundle, check_execution
from twotower.doctor.reference_answer import (
    REFERENCE_TARGET,
    check_answer,
    reference_answer_of,
)
from twotower.evaluate.suite import load_suite
from twotower.hardware import probe_machine

Build = Callable[[str, str, str], Path]
ATOL = 1e-3
"""Of confidences in float32; 1e-4 holds on a CPU, a GPU's exp and rsqrt are approximations."""
DIFFUSION = GenerationConfig(max_new_tokens=48, confidence_threshold=0.5, ignore_eos=True)


@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
@pytest.mark.parametrize("target", targets())
def test_goldens_in_float32(built_for: Build, folder: str, target: str) -> None:
    cases = json.loads((FIXTURES / folder / "golden.json").read_text())
    with opened(built_for(folder, "float32", target), target) as model:
        for case in cases:
            steps: list = []
            check_golden(model, case, on_step=steps.append)
            for record, want in zip(steps, case["steps"], strict=True):
                np.testing.assert_allclose(record.confidence, want["confidence"], rtol=0, atol=ATOL)
        check_goldens(model, cases)


@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b", "twotower-tiny"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", targets())
def test_half_wide_engines_give_the_reference_answer(
    built_for: Build, target: str, dtype: str, folder: str
) -> None:
    if (target, dtype) == ("ort-cuda", "bfloat16"):
        pytest.skip("ONNX Runtime's CUDA provider has no bfloat16 kernels for several operators")
    path = built_for(folder, dtype, target)
    bundle = Bundle.open(path)
    reference, _ = reference_answer_of(bundle, lambda: opened(path, REFERENCE_TARGET))
    assert reference is not None
    with opened(path, target) as model:
        results = list(check_answer(reference, model, dtype))
    assert results[0].ok is True, "\n".join(r.detail for r in results)


@pytest.mark.parametrize("target", targets())
def test_the_trained_model_keeps_its_text_in_float16(built_for: Build, target: str) -> None:
    """60 prompts; `make fp16-check` shows that half precision leaves all but one of 624."""
    problems = load_suite().only(limit=9).problems[:60]
    path = built_for("twotower-tiny", "float16", target)
    with (
        opened(path, target) as model,
        opened(built_for("twotower-tiny", "float32", target), REFERENCE_TARGET) as reference,
    ):
        for result in measure_agreement(reference, model, problems):
            assert len(result.divergences) <= 2, result


@pytest.mark.parametrize("target", targets())
def test_a_sound_chain(built_for: Build, target: str) -> None:
    with opened(built_for("hybrid-a", "float32", target), target) as model:
        failed = [r for r in check_bundle(model) if r.ok is False]
    assert not failed


@pytest.mark.parametrize("target", targets())
def test_a_replayed_graph_writes_what_single_launches_write(built_for: Build, target: str) -> None:
    """Several blocks and numbers of rows: a graph captured for another state would show."""
    path = built_for("hybrid-a", "float32", target)
    prompts = [random_prompt(n) for n in (5, 60)]
    texts = []
    for graphs in (True, False):
        with opened(path, target, graphs=graphs) as model:
            runs = ([prompts[0]], prompts, [prompts[1]], [prompts[0]])
            texts.append([[out.tokens for out in model.generate(some, DIFFUSION)] for some in runs])
    assert texts[0] == texts[1]
    assert texts[0][0] == texts[0][3], "the same after other shapes were run"


@pytest.mark.parametrize("target", targets())
def test_an_engine_agrees_with_itself(built_for: Build, target: str) -> None:
    """Launched piece by piece, with other memory for every block, and on two GPUs if there are."""
    path = built_for("hybrid-b", "float32", target)
    gpus = len(probe_machine().gpus)
    results = check_execution(lambda **options: opened(path, target, **options), devices=gpus)
    assert not [r for r in results if r.ok is False]


@pytest.mark.parametrize("target", targets())
def test_a_short_text_is_the_same_beside_a_long_one(built_for: Build, target: str) -> None:
    """Its part of the cache is then mostly padding, and grows while it is written."""
    with opened(built_for("hybrid-b", "float32", target), target) as model:
        check_rows(model, [random_prompt(7), random_prompt(240)], DIFFUSION)


@pytest.mark.parametrize("target", targets())
def test_rows_are_independent(built_for: Build, target: str) -> None:
    prompts = [random_prompt(n) for n in (1, 3, 17, 40, 64, 90)]
    with opened(built_for("hybrid-a", "float32", target), target) as model:
        for config in (DIFFUSION, AR):
            check_rows(model, prompts, config)
            check_rows(model, prompts[::-1], config)


@pytest.mark.parametrize("target", targets())
def test_a_tower_on_each_of_two_devices(built_for: Build, target: str) -> None:
    if len(probe_machine().gpus) < 2:
        pytest.skip("there is one GPU")
    path, prompt = built_for("hybrid-a", "float32", target), [5, 6, 7]
    texts = []
    for devices in ((0,), (0, 1)):
        with opened(path, target, devices=devices) as model:
            texts.append(model.generate(prompt, DIFFUSION).tokens)
    assert texts[0] == texts[1]
