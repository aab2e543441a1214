"""Export, build, and the loop that ships, against the reference results."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.bundles import built_fixture
from tests.helpers.goldens import AR, check_golden, random_prompt
from tests.helpers.graphs import FIXTURES
from tests.helpers.towers import golden_config
from twotower import GenerationConfig, TwoTower
from twotower.bundle import Bundle
from twotower.runtime import Request, StepRecord
from twotower.runtime.engines import open_towers

FOLDERS = ("hybrid-a", "hybrid-b")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: built_fixture(name, folder / name) for name in FOLDERS}


@pytest.fixture(scope="module")
def models(bundles: dict[str, Bundle]) -> Any:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(TwoTower.open(bundle.path, target="ort-cpu", max_batch=16))
            for name, bundle in bundles.items()
        }


@cache
def cases(folder: str) -> list[dict[str, Any]]:
    return json.loads((FIXTURES / folder / "golden.json").read_text())


def check_steps(records: list[StepRecord], row: int, case: dict[str, Any]) -> None:
    """Every pass of one row: block, predictions, confidences."""
    mine = [(r, list(r.rows).index(row)) for r in records if row in r.rows]
    assert len(mine) == case["nfe"]
    for (record, at), want in zip(mine, case["steps"], strict=True):
        assert [record.block_in[at].tolist()] == want["block_in"]
        assert [record.predicted[at].tolist()] == want["predicted"]
        np.testing.assert_allclose(record.confidence[at], want["confidence"][0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("folder", FOLDERS)
def test_goldens_alone(models: dict[str, TwoTower], folder: str) -> None:
    for case in cases(folder):
        assert case["min_margin"] > 1e-5
        records: list[StepRecord] = []
        check_golden(models[folder], case, on_step=records.append)
        check_steps(records, 0, case)
        ar = models[folder].generate(case["prompt"], AR)
        assert list(ar.tokens) == case["ar_greedy_tokens"]
        assert ar.usage.prompt_tokens == len(case["prompt"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_goldens_in_one_call(models: dict[str, TwoTower], folder: str) -> None:
    """All cases at once: other prompts, thresholds and steps in each row of a batch."""
    records: list[StepRecord] = []
    requests = [Request(case["prompt"], golden_config(case)) for case in cases(folder)]
    results = models[folder].generate(requests, on_step=records.append)
    for row, (out, case) in enumerate(zip(results, cases(folder), strict=True)):
        assert list(out.tokens) == case["diffusion_tokens"]
        assert out.usage.nfe == case["nfe"]
        check_steps(records, row, case)
    ar = models[folder].generate([c["prompt"] for c in cases(folder)], AR)
    assert [list(r.tokens) for r in ar] == [c["ar_greedy_tokens"] for c in cases(folder)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_bundles_generate_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    with TwoTower.open(built_fixture("hybrid-a", tmp_path / "b", dtype).path) as model:
        case = cases("hybrid-a")[1]
        out = model.generate(case["prompt"], golden_config(case))
        same = sum(a == b for a, b in zip(out.tokens, case["diffusion_tokens"], strict=True))
        assert same >= len(out.tokens) // 4, "weights in half precision: near, not equal"


PROMPTS = [random_prompt(n) for n in (1, 3, 17, 40, 64, 90, 130, 300)]


@pytest.mark.slow
@settings(max_examples=6)
@given(
    order=st.permutations(range(8)),
    temperature=st.sampled_from([0.0, 0.9]),
    mode=st.sampled_from(["diffusion", "ar"]),
)
def test_a_row_is_the_same_in_any_batch(
    models: dict[str, TwoTower], order: list[int], temperature: float, mode: str
) -> None:
    def request(i: int) -> Request:
        config = GenerationConfig(
            mode=mode,
            max_new_tokens=20 + i,
            confidence_threshold=0.5,
            temperature=temperature,
            top_k=20,
            seed=i,
            ignore_eos=i % 2 == 0,
        )
        return Request(PROMPTS[i], config)

    model = models["hybrid-a"]
    together = model.generate([request(i) for i in order])
    for place, i in enumerate(order):
        one, alone = together[place], model.generate(request(i))
        assert (one.tokens, one.finish_reason) == (alone.tokens, alone.finish_reason)
        assert one.usage == alone.usage


@settings(max_examples=8)
@given(chunk=st.integers(1, 256), length=st.integers(1, 300), seed=st.integers(0, 3))
def test_any_chunking_of_a_prompt_gives_the_same_text(
    bundles: dict[str, Bundle], chunk: int, length: int, seed: int
) -> None:
    prompt = random_prompt(length, seed)
    config = GenerationConfig(max_new_tokens=32, confidence_threshold=0.5, ignore_eos=True)
    texts = []
    for width in (chunk, 256):
        towers = open_towers(bundles["hybrid-a"], "ort-cpu")
        with TwoTower.from_towers(towers, max_chunk=width) as model:
            texts.append(model.generate(prompt, config).tokens)
    assert texts[0] == texts[1]


def test_greedy_is_temperature_zero_and_seeds_differ(models: dict[str, TwoTower]) -> None:
    model = models["hybrid-b"]
    prompt = random.Random(0).sample(range(4, 290), 12)
    for mode in ("diffusion", "ar"):
        plain = GenerationConfig(mode=mode, max_new_tokens=32, ignore_eos=True)

        def text(plain: GenerationConfig = plain, **options: Any) -> tuple[int, ...]:
            return model.generate(prompt, replace(plain, **options)).tokens

        greedy, hot = text(seed=0), text(seed=1, temperature=1.5)
        assert text(seed=1) == greedy
        assert text(seed=1, temperature=1.5) == hot != text(seed=0, temperature=1.5)
        assert text(seed=3, temperature=1.5, top_k=1) == greedy, "the best of one is the best"
        if mode == "ar":
            assert text(seed=3, temperature=1.0, top_p=1e-6) == greedy


def test_keys_and_values_are_updated_in_place(
    models: dict[str, TwoTower], capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime warns when TensorScatter copies the cache; a bound one is never copied."""
    import onnxruntime as ort

    ort.set_default_logger_severity(2)
    try:
        models["hybrid-a"].generate(PROMPTS[3], GenerationConfig(max_new_tokens=48))
    finally:
        ort.set_default_logger_severity(3)
    assert "copying past_cache" not in capfd.readouterr().err
