"""Settings beside the weights of a checkpoint, from its files through a bundle to the text: what counts and what must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bundles import built_tiny
from twotower.bundle import Bundle
from twotower.runtime import TwoTower

PROMPT = "Q: flip: a cat b dog c owl d fish\nA:"
TRUNCATED_AND_PADDED = {
    "truncation": {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    },
}


@pytest.fixture(scope="module")
def changed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The trained model, its tokenizer.json with the settings of a training."""
    return built_tiny(tmp_path_factory.mktemp("changed") / "bundle", tokenizer=TRUNCATED_AND_PADDED)


def test_stored_truncation_and_padding_leave_prompts_whole(changed_bundle: Bundle, tiny_bundle: Path) -> None:
    with TwoTower.open(tiny_bundle, target="ort-cpu") as plain, TwoTower.open(changed_bundle.path, target="ort-cpu") as changed:
        expected, got = plain.generate(PROMPT), changed.generate(PROMPT)
        assert (got.usage.prompt_tokens, got.text) == (expected.usage.prompt_tokens, expected.text)
        assert got.text
        pair = ("Q: flip: a cat b dog c owl d fish\nA: d fish c owl", " b dog a cat")
        assert changed.score(pair) == plain.score(pair)
