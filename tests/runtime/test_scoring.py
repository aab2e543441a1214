"""Likelihoods of given continuations against the torch tower's whole distribution."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tests.helpers.bundles import built_fixture
from tests.helpers.fake_engines import fake_config, fake_towers
from tests.helpers.graphs import FIXTURES
from twotower.config import GenerationConfig
from twotower.errors import RequestCancelledError, RequestError
from twotower.export import Checkpoint
from twotower.model import empty_state
from twotower.model.loading import load_context_tower
from twotower.runtime import Score, TwoTower
from twotower.runtime.sampling import Sampling
from twotower.runtime.tokenizer import Tokenizer

PAIRS = [
    ([5, 6, 7], [8, 9, 10, 11]),
    ([40], [41]),
    (list(range(60, 90)), list(range(100, 109))),
    ([], [5, 6]),
    ([9, 9], []),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    bundle = built_fixture("hybrid-a", tmp_path_factory.mktemp("scoring") / "b")
    with TwoTower.open(bundle.path, target="ort-cpu") as opened:
        yield opened


def expected(context: list[int], continuation: list[int]) -> np.ndarray[Any, Any]:
    """Log-probabilities of every token at each place of the continuation, [N,V]."""
    checkpoint = Checkpoint.open(FIXTURES / "hybrid-a")
    tower = load_context_tower(
        checkpoint.config, lambda name: torch.from_numpy(checkpoint.tensors[name].numpy().copy())
    )
    tokens = [*(context or [checkpoint.config.bos_token_id]), *continuation]
    with torch.inference_mode():
        state = empty_state(checkpoint.config, 1, len(tokens))
        hidden, _ = tower.extend(torch.tensor([tokens]), state, past=torch.tensor([0]))
        logits = tower.logits(hidden[0, len(tokens) - len(continuation) - 1 : -1])
    return logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("pair", PAIRS[:4])
def test_scores_are_the_torch_towers(model: TwoTower, pair: tuple[list[int], list[int]]) -> None:
    score = model.score(pair)
    every = expected(*pair)
    want = every[np.arange(len(pair[1])), pair[1]]
    inside = np.count_nonzero(every > want[:, None], axis=1) < 63
    got = np.array(score.logprobs)
    np.testing.assert_allclose(got[inside], want[inside], atol=1e-4)
    assert (got[~inside] >= want[~inside] - 1e-4).all(), "an upper bound"
    assert score.bounded == pytest.approx(np.count_nonzero(~inside), abs=1)
    assert score.total == pytest.approx(sum(score.logprobs))
    assert score.greedy is bool((every.argmax(-1) == pair[1]).all())


def test_an_empty_continuation_is_certain(model: TwoTower) -> None:
    assert model.score(([5], [])) == Score(tokens=(), logprobs=(), greedy=True, bounded=0)
    assert model.score(([5], [])).total == 0
    assert model.score([]) == []


def test_what_greedy_generation_writes_scores_as_greedy(
    model: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = Sampling.choose

    def noted(self: Sampling, ids: Any, logprobs: Any, *, index: int) -> int:
        seen.append(float(logprobs[0]))
        return real(self, ids, logprobs, index=index)

    monkeypatch.setattr(Sampling, "choose", noted)
    config = GenerationConfig(mode="ar", max_new_tokens=12, ignore_eos=True)
    written = model.generate([5, 6, 7], config).tokens
    score = model.score(([5, 6, 7], list(written)))
    assert score.greedy
    assert score.bounded == 0
    assert score.tokens == written
    np.testing.assert_allclose(score.logprobs, seen, atol=2e-5)
    other = [*written[:5], (written[5] + 1) % 250 + 4, *written[6:]]
    assert not model.score(([5, 6, 7], other)).greedy
    assert model.score(([5, 6, 7], other)).total < score.total


def test_long_continuations_outgrow_the_cache(model: TwoTower) -> None:
    """250 tokens of context and 40 more: from a capacity of 256 to one of 512."""
    tokens = (np.arange(290) * 37 % 200 + 5).tolist()
    score = model.score((tokens[:250], tokens[250:]))
    every = expected(tokens[:250], tokens[250:])[np.arange(40), tokens[250:]]
    got = np.array(score.logprobs)
    assert (got >= every - 1e-4).all()
    assert np.isclose(got, every, atol=1e-4).sum() >= 40 - score.bounded


@pytest.mark.parametrize(
    ("pair", "what"),
    [
        (([5], [99999]), "outside the vocabulary"),
        (([-1], [5]), "outside the vocabulary"),
        (("text", "text"), "tokenizer"),
        (("text", [5]), "of one kind"),
        (([5], [6.7]), "a prompt holds 6.7"),
        (([5.0], [6]), "a prompt holds 5.0"),
        ((["a"], [6]), "a prompt holds 'a'"),
        ((None, [6]), "a NoneType is not a prompt"),
        (([-1], []), "the context of pair 0 has a token id outside the vocabulary"),
        (([5], [6], [7]), "pair 0 is not a context with its continuation"),
        ([([5], [6]), [7]], "pair 1 is not a context with its continuation"),
        ([[5], [6]], "pair 0 is not a context"),
        ("text", "this is not a context"),
        (5, "this is not a context"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: TwoTower, pair: Any, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        model.score(pair)


def test_the_longest_pair_that_fits_is_scored_and_the_next_refused_before_any_work() -> None:
    fake = fake_towers()
    with TwoTower.from_towers(fake.towers, max_context=64) as small:
        says = r"(?s)pair 1 is too long.*holds 64 tokens.*larger max_context"
        for refused in (([5] * 60, [6] * 5), ([], [6] * 64), ([5] * 65, [])):
            with pytest.raises(RequestError, match=says):
                small.score([([5], [6]), refused])
        assert fake.log == []
        assert len(small.score(([5] * 60, [6] * 4)).logprobs) == 4
        assert len(small.score(([], [6] * 63)).logprobs) == 63


def test_every_candidate_gets_its_own_value_and_every_other_token_the_bound() -> None:
    """All 97 tokens of the toy after one context: 64 are its candidates."""
    with TwoTower.from_towers(fake_towers().towers) as toy:
        scores = toy.score([([5, 6], [t]) for t in range(97)])
        values = np.array([s.total for s in scores])
        outside = np.array([s.bounded == 1 for s in scores])
        assert np.count_nonzero(outside) == 33
        assert [s.tokens for s in scores] == [(t,) for t in range(97)]
        assert [i for i, s in enumerate(scores) if s.greedy] == [int(values.argmax())]
        left = 1 - np.exp(values[~outside]).sum()
        bound = min(values[~outside].min(), math.log(left))
        assert values[outside] == pytest.approx(bound, abs=1e-3)
        one = GenerationConfig(mode="ar", max_new_tokens=1, ignore_eos=True)
        assert list(toy.generate([5, 6], one).tokens) == [int(values.argmax())]


def test_batches_of_mixed_lengths_come_back_in_order() -> None:
    pairs = [([5 + i] * (1 + 37 * i % 300), list(range(9, 9 + i % 5))) for i in range(11)]
    with TwoTower.from_towers(fake_towers().towers, max_batch=3, max_chunk=64) as toy:
        together = toy.score(pairs)
        assert together == [toy.score(pair) for pair in pairs]
        assert [s.tokens for s in together] == [tuple(continuation) for _, continuation in pairs]


def test_scoring_can_be_cancelled_and_the_session_goes_on() -> None:
    with TwoTower.from_towers(fake_towers().towers) as model:
        want = model.score(([5, 6], [7, 8, 9]))
        with pytest.raises(RequestCancelledError):
            model.score(([5, 6], [7, 8, 9]), cancelled=lambda: True)
        assert model.score(([5, 6], [7, 8, 9])) == want
        assert all(math.isfinite(x) and x <= 0 for x in want.logprobs)


def test_texts_are_cut_where_the_context_ends(tmp_path: Path, tiny_bundle: Path) -> None:
    prompt, answer = "Q: sort: q c x a\nA:", " a c q x"
    with TwoTower.open(tiny_bundle) as model:
        one = model.score((prompt, answer))
        assert len(one.logprobs) == 4
        assert model.score((f"{prompt} ", answer[1:])) == one
        assert model.tokenizer is not None
        before, whole = model.tokenizer.encode(prompt), model.tokenizer.encode(prompt + answer)
        assert model.score((before, whole[len(before) :])) == one
        assert model.score((f"{prompt} ", "")).tokens == ()


@pytest.mark.parametrize("added", [True, False])
def test_a_typed_bos_is_the_context_s_only_one(tokenizer_file: Path, *, added: bool) -> None:
    backend = Backend.from_file(str(tokenizer_file))
    if not added:
        backend.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    towers, tokenizer = fake_towers(fake_config(vocab_size=260)).towers, Tokenizer(backend)
    with TwoTower.from_towers(towers, tokenizer=tokenizer) as toy:
        a, b = (backend.token_to_id(letter) for letter in "ab")
        for pair in (("<s>", "ab"), ("", "<s>ab"), ("", "ab")):
            assert toy.score(pair) == toy.score(([1], [a, b]))
        assert toy.score(("<s>a", "b")) == toy.score(([1, a], [b]))
        assert toy.score(([1], [1, a])).tokens == (1, a), "token ids are taken as they are"
