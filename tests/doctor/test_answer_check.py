"""The known answer of a bundle: computed once, kept beside the engines, matched or explained."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import built_fixture, copy_of
from twotower.builders import BuildConfig, build_engines
from twotower.bundle import Bundle
from twotower.doctor.answer_check import KEPT_BY, check_answer, known_answer_of, setting_of
from twotower.doctor.canary import CheckResult
from twotower.doctor.known_answer import (
    ANSWER_FILE,
    KnownAnswer,
    compute_answer,
    known_prompts,
    read_answer,
    write_answer,
)
from twotower.doctor.known_issues import Setting
from twotower.evaluate.half_precision import RoundingBuilder
from twotower.runtime import TwoTower


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built_fixture("hybrid-a", tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def model(original: Bundle) -> Any:
    with TwoTower.open(original.path, target=KEPT_BY) as opened:
        yield opened


@pytest.fixture(scope="module")
def known(original: Bundle, model: TwoTower) -> KnownAnswer:
    return compute_answer(original, model)


@pytest.fixture
def bundle(original: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_of(original, tmp_path / "copy"))


def never() -> Any:
    raise AssertionError("the kept answer is used")


def verdict(
    known: KnownAnswer, model: TwoTower, setting: Setting, **options: Any
) -> list[CheckResult]:
    return list(check_answer(known, model, setting, **options))


def test_it_is_computed_once_and_kept(bundle: Bundle, model: TwoTower) -> None:
    assert read_answer(bundle) is None
    first, where = known_answer_of(bundle, lambda: nullcontext(model))
    assert "kept in the bundle" in where
    again, where = known_answer_of(bundle, never)
    assert again == first
    assert where == "kept in the bundle, computed by ort-cpu"
    Bundle.open(bundle.path)  # what was added is no damage


def test_the_long_text_outgrows_a_bucket_of_the_cache(known: KnownAnswer) -> None:
    assert len(known.short.prompt) + len(known.short.tokens) < 256 - 16
    assert len(known.long.prompt) < 256 < len(known.long.prompt) + len(known.long.tokens)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"schema": 9}', "graphs", "prompt"])
def test_an_answer_of_something_else_is_not_used(
    bundle: Bundle, known: KnownAnswer, damage: str
) -> None:
    assert write_answer(bundle, known)
    file = bundle.path / ANSWER_FILE
    data = json.loads(file.read_text())
    if damage == "graphs":
        data["graphs"]["denoiser"] = "other"
    elif damage == "prompt":
        data["short"]["prompt"][0] += 1
    file.write_text(json.dumps(data) if damage in ("graphs", "prompt") else damage)
    assert read_answer(bundle) is None


def test_a_bundle_without_the_reference_engine_says_how_to_get_one(
    tmp_path: Path, bundle: Bundle
) -> None:
    (bundle.path / "engines" / "ort-cpu" / "build.json").unlink()
    answer, why = known_answer_of(bundle, lambda: TwoTower.open(bundle.path, target=KEPT_BY))
    assert answer is None
    assert "twotower build" in why


def test_a_sound_engine_passes(original: Bundle, known: KnownAnswer, model: TwoTower) -> None:
    (result,) = verdict(known, model, setting_of(original, KEPT_BY))
    assert result.ok is True


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_no_failure(tmp_path: Path, known: KnownAnswer, dtype: str) -> None:
    narrow = built_fixture("hybrid-a", tmp_path / "b", dtype)
    build_engines(narrow, KEPT_BY, RoundingBuilder(), config=BuildConfig(force=True))
    with TwoTower.open(narrow.path, target=KEPT_BY) as rounded:
        (result,) = verdict(known, rounded, Setting(target="ort-cuda", dtype=dtype))
        assert result.ok is True, result.detail
        assert (
            verdict(known, rounded, Setting(target="ort-cuda", dtype="float32"))[0].ok is False
        ), "in float32 it would be one"


def test_a_wrong_engine_fails_and_is_explained(known: KnownAnswer, model: TwoTower) -> None:
    other = replace(
        known.short,
        tokens=known.short.tokens[::-1],
        logprobs=tuple(x - 1 for x in known.short.logprobs),
    )
    result, *issues = verdict(
        replace(known, short=other), model, Setting(target="trt", dtype="float16", sm=120)
    )
    assert result.ok is False
    assert "wrong from the first token on" in result.detail or "wrong later" in result.detail
    assert "#4837" in issues[0].detail
    assert all(issue.ok is None for issue in issues)


def test_an_engine_without_graphs_is_asked_only_when_something_is_wrong(
    known: KnownAnswer, model: TwoTower
) -> None:
    setting = Setting(target="trt", dtype="float32")
    assert verdict(known, model, setting, open_plain=never)[0].ok is True
    wrong = replace(known, short=replace(known.short, tokens=(7, *known.short.tokens[1:])))
    result, *_ = verdict(wrong, model, setting, open_plain=lambda: nullcontext(model))
    assert result.ok is False
    assert "CUDA graph" not in result.detail, "it is as wrong without them"


def test_prompts_hold_no_special_tokens(model: TwoTower) -> None:
    c = model.config
    for prompt in known_prompts(c):
        assert not {c.mask_token_id, c.pad_token_id, *c.eos_token_ids} & set(prompt)
