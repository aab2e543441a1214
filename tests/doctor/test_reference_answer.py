"""The reference answer of a bundle: computed once, stored beside the engines, matched or not."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import built_fixture, copy_of
from tests.helpers.source import ROOT
from tools.half_precision import RoundingBuilder
from twotower.builders import BuildConfig, build_engines
from twotower.bundle import Bundle
from twotower.doctor.checks import CheckResult
from twotower.doctor.reference_answer import (
    ANSWER_FILE,
    KNOWN_ISSUES,
    REFERENCE_TARGET,
    Answer,
    Comparison,
    Observed,
    Pass,
    ReferenceAnswer,
    check_answer,
    compare,
    compute_answer,
    read_answer,
    reference_answer_of,
    reference_prompts,
    write_answer,
)
from twotower.runtime import TwoTower


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built_fixture("hybrid-a", tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def model(original: Bundle) -> Any:
    with TwoTower.open(original.path, target=REFERENCE_TARGET) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(original: Bundle, model: TwoTower) -> ReferenceAnswer:
    return compute_answer(original, model)


@pytest.fixture
def bundle(original: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_of(original, tmp_path / "copy"))


def never() -> Any:
    raise AssertionError("the stored answer is used")


def verdict(
    reference: ReferenceAnswer, model: TwoTower, dtype: str, **options: Any
) -> list[CheckResult]:
    return list(check_answer(reference, model, dtype, **options))


def test_it_is_computed_once_and_stored(bundle: Bundle, model: TwoTower) -> None:
    assert read_answer(bundle) is None
    first, where = reference_answer_of(bundle, lambda: nullcontext(model))
    assert "stored in the bundle" in where
    again, where = reference_answer_of(bundle, never)
    assert again == first
    assert where == "stored in the bundle, computed by ort-cpu"
    Bundle.open(bundle.path)  # what was added is no damage


def test_prompts_are_ordinary_and_the_long_text_outgrows_a_bucket_of_the_cache(
    reference: ReferenceAnswer, model: TwoTower
) -> None:
    short, long = reference.short, reference.long
    assert len(short.prompt) + len(short.tokens) < 256 - 16
    assert len(long.prompt) < 256 < len(long.prompt) + len(long.tokens)
    c = model.config
    for prompt in reference_prompts(c):
        assert not {c.mask_token_id, c.pad_token_id, *c.eos_token_ids} & set(prompt)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"schema": 9}', "schema", "graphs", "prompt"])
def test_an_answer_of_something_else_is_not_used(
    bundle: Bundle, reference: ReferenceAnswer, damage: str
) -> None:
    assert write_answer(bundle, reference)
    file = bundle.path / ANSWER_FILE
    data = json.loads(file.read_text())
    if damage == "graphs":
        data["graphs"]["denoiser"] = "other"
    elif damage == "prompt":
        data["short"]["prompt"][0] += 1
    elif damage == "schema":
        data["schema"] = 9
    altered = damage in ("schema", "graphs", "prompt")
    file.write_text(json.dumps(data) if altered else damage)
    assert read_answer(bundle) is None


def test_a_bundle_without_the_reference_engine_says_how_to_get_one(bundle: Bundle) -> None:
    (bundle.path / "engines" / "ort-cpu" / "build.json").unlink()
    answer, why = reference_answer_of(bundle, lambda: TwoTower.open(bundle.path, "ort-cpu"))
    assert answer is None
    assert "twotower build" in why


def test_a_sound_engine_passes(reference: ReferenceAnswer, model: TwoTower) -> None:
    (result,) = verdict(reference, model, "float32", open_plain=never)
    assert result.ok is True


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_no_failure(tmp_path: Path, reference: ReferenceAnswer, dtype: str) -> None:
    narrow = built_fixture("hybrid-a", tmp_path / "b", dtype)
    build_engines(narrow, REFERENCE_TARGET, RoundingBuilder(), config=BuildConfig(force=True))
    with TwoTower.open(narrow.path, target=REFERENCE_TARGET) as rounded:
        (result,) = verdict(reference, rounded, dtype)
        assert result.ok is True, result.detail
        assert verdict(reference, rounded, "float32")[0].ok is False, "in float32 it would be one"


def test_a_wrong_engine_fails_and_the_page_is_named(
    reference: ReferenceAnswer, model: TwoTower
) -> None:
    other = replace(
        reference.short,
        tokens=(*reference.short.tokens[:3], 7, *reference.short.tokens[4:]),
        logprobs=tuple(x - 1 for x in reference.short.logprobs),
    )
    result, pointer = verdict(replace(reference, short=other), model, "float16")
    assert result.ok is False
    assert result.detail.startswith("wrong tokens: short text differs from token 3 (error 1.0e+00")
    assert "long text same tokens" in result.detail
    assert (pointer.ok, pointer.detail) == (None, f"{KNOWN_ISSUES}#wrong-tokens")


def test_cuda_graphs_are_not_blamed_where_it_is_as_wrong_without_them(
    reference: ReferenceAnswer, model: TwoTower
) -> None:
    short = replace(reference.short, tokens=(7, *reference.short.tokens[1:]))
    wrong = replace(reference, short=short)
    result, *_ = verdict(wrong, model, "float32", open_plain=lambda: nullcontext(model))
    assert result.ok is False
    assert "cuda graphs" not in result.detail


# What differs, and the section that describes it.

SOUND = Comparison(first=None, error=0.0)
DEAD = Comparison(first=0, error=math.inf, finite=False)


def far(first: int | None) -> Comparison:
    return Comparison(first=first, error=1.0)


def seen(
    short: Comparison = SOUND, long: Comparison = SOUND, *, dtype: str = "float32", **more: Any
) -> Observed:
    return Observed(dtype=dtype, short=short, long=long, **more)


CASES: list[tuple[Observed, tuple[str, ...]]] = [
    (seen(), ()),
    (seen(far(0)), ("wrong-tokens",)),
    (seen(long=far(30)), ("wrong-in-long-texts",)),
    (seen(long=far(0)), ("wrong-tokens",)),
    (seen(far(7), far(30)), ("wrong-tokens",)),
    (seen(DEAD), ("not-finite", "wrong-tokens")),
    (seen(long=replace(DEAD, first=30)), ("not-finite", "wrong-in-long-texts")),
    (seen(replace(SOUND, constant=True)), ("zeros-or-one-token", "wrong-tokens")),
    (seen(far(0), without_graphs=SOUND), ("wrong-with-cuda-graphs", "wrong-tokens")),
    (seen(far(0), without_graphs=far(0)), ("wrong-tokens",)),
    (seen(far(0), in_batch_right=True, in_batch=False), ("wrong-tokens", "wrong-alone")),
    (seen(in_batch=False, padded=False), ("wrong-in-a-batch",)),
    (seen(in_batch=True, padded=False), ("wrong-beside-a-longer-text",)),
    (seen(Comparison(first=3, error=1e-7)), ("wrong-tokens",)),
    (seen(Comparison(first=3, error=0.01), dtype="float16"), ()),
    (seen(Comparison(first=3, error=0.01), dtype="bfloat16"), ()),
    (seen(Comparison(first=None, error=0.01)), ("wrong-tokens",)),
    (seen(far(3), dtype="float16"), ("wrong-tokens",)),
]


@pytest.mark.parametrize(("observed", "want"), CASES)
def test_what_differs_has_a_section(observed: Observed, want: tuple[str, ...]) -> None:
    assert observed.sections() == want


def test_the_page_has_every_section() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / KNOWN_ISSUES).read_text("utf-8"), re.MULTILINE)
    sections = {section for _, want in CASES for section in want}
    assert {h.lower().replace(" ", "-") for h in headings} == sections | {"the-process-dies"}


ANSWER = Answer(
    prompt=(5, 6),
    tokens=(7, 8, 9, 10),
    passes=(
        Pass((3, 3), (7, 8), (0.9, 0.5)),
        Pass((7, 3), (7, 8), (0.9, 0.8)),
        Pass((3, 3), (9, 10), (0.9, 0.9)),
    ),
    ar_tokens=(7, 8, 9),
    logprobs=(-0.1, -0.2, -0.3),
)


def test_numbers_are_compared_while_they_come_from_the_same_blocks() -> None:
    """The third pass began from another block: its confidences say nothing."""
    assert compare(ANSWER, ANSWER) == SOUND
    other = replace(ANSWER.passes[2], block_in=(9, 3), confidence=(0.0, 0.0))
    got = replace(ANSWER, passes=(*ANSWER.passes[:2], other), ar_tokens=(7, 8, 11))
    result = compare(ANSWER, replace(got, logprobs=(-0.1, -0.25, -0.35)))
    assert result.first == 2
    assert result.error == pytest.approx(0.05)


def test_one_far_number_is_a_close_call_and_not_an_error() -> None:
    assert compare(ANSWER, replace(ANSWER, logprobs=(-0.1, -0.2, -5.0))).error == 0.0
    assert compare(ANSWER, replace(ANSWER, logprobs=(-1.1, -0.2, -5.0))).error == pytest.approx(1.0)


def test_what_a_dead_engine_returns_is_seen() -> None:
    zeros = tuple(replace(p, confidence=(0.0, 0.0)) for p in ANSWER.passes)
    assert compare(ANSWER, replace(ANSWER, passes=zeros)).constant
    assert compare(ANSWER, replace(ANSWER, tokens=(0, 0, 0, 0))).constant
    assert not compare(ANSWER, replace(ANSWER, logprobs=(math.nan, 0.0, 0.0))).finite
