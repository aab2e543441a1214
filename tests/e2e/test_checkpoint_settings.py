"""Settings beside the weights of a checkpoint: which of them change a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.bundles import TRUNCATED_AND_PADDED, built_tiny
from tests.helpers.quantized import quantized
from twotower.bundle import Bundle, derive_bundle
from twotower.config import GenerationConfig
from twotower.runtime import TwoTower

PROMPT = "Q: flip: a cat b dog c owl d fish\nA:"


END = 180  # a letter of the answer


class Models(NamedTuple):
    """The trained model as it is, and exported with other settings."""

    plain: TwoTower
    changed: TwoTower


@pytest.fixture(scope="module")
def changed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its tokenizer.json is as after a training, and one more token ends a text."""
    return built_tiny(
        tmp_path_factory.mktemp("changed") / "bundle",
        tokenizer=TRUNCATED_AND_PADDED,
        generation_config={"eos_token_id": [2, END]},
    )


@pytest.fixture(scope="module")
def models(tiny_bundle: Path, changed_bundle: Bundle) -> Iterator[Models]:
    with TwoTower.open(tiny_bundle) as plain, TwoTower.open(changed_bundle.path) as changed:
        yield Models(plain, changed)


def test_stored_truncation_and_padding_leave_prompts_whole(models: Models) -> None:
    config = replace(models.plain.defaults, ignore_eos=True, max_new_tokens=32)
    expected, got = (model.generate(PROMPT, config) for model in models)
    assert (got.usage.prompt_tokens, got.text) == (expected.usage.prompt_tokens, expected.text)
    assert got.text
    pair = (f"{PROMPT} d fish c owl", " b dog a cat")
    assert models.changed.score(pair) == models.plain.score(pair)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_text_ends_at_any_token_of_the_list(models: Models, mode: str) -> None:
    config = replace(models.plain.defaults, mode=mode, max_new_tokens=64)
    whole, short = (model.generate(PROMPT, config) for model in models)
    assert whole.finish_reason == short.finish_reason == "eos"
    assert short.tokens == whole.tokens[: whole.tokens.index(END)]
    past = models.changed.generate(PROMPT, replace(config, ignore_eos=True))
    assert past.tokens[: len(whole.tokens)] == whole.tokens
    assert past.finish_reason == "length"


def test_a_typed_bos_changes_neither_a_text_nor_a_score(models: Models) -> None:
    typed, plain = (models.plain.generate(text) for text in (f"<s>{PROMPT}", PROMPT))
    assert (typed.text, typed.usage) == (plain.text, plain.usage)
    assert models.plain.generate("<s>").usage.prompt_tokens == 1
    answer = " d fish c owl"
    for context in (PROMPT, ""):
        expected = models.plain.score((context, answer))
        assert models.plain.score((f"<s>{context}", answer)) == expected
    assert models.plain.score(("", f"<s>{answer}")) == models.plain.score(("", answer))


@pytest.mark.slow
def test_derived_and_quantized_bundles_carry_the_list(
    changed_bundle: Bundle,
    tmp_path: Path,
) -> None:
    presets = {"fast": GenerationConfig(steps_per_block=4)}
    derived = derive_bundle(changed_bundle, tmp_path / "d", presets=presets, default="fast")
    few = quantized(changed_bundle.path, tmp_path, "int8-weights")
    assert {b.config.eos_token_ids for b in (changed_bundle, derived, few)} == {(2, END)}
    with TwoTower.open(few.path, target="ort-cpu") as model:
        assert END not in model.generate(PROMPT).tokens
