"""Where a row's text ends, whatever blocks its tokens come in, and what it gives then."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.fake_engines import fake_config
from twotower.config import GenerationConfig
from twotower.runtime import BlockEvent, Generation, Timings, Usage
from twotower.runtime.rows import Continuation, Row, StopRule
from twotower.runtime.tokenizer import IncrementalText, Tokenizer

with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
EOS = frozenset({2})


def run(
    tokenizer: Tokenizer | None, tokens: list[int], rule: StopRule, block: int = 4
) -> tuple[Continuation, list[str | None]]:
    """The row after reading tokens in blocks, and the text it handed out with each."""
    row = Continuation(rule, IncrementalText(tokenizer) if tokenizer else None)
    texts = []
    for start in range(0, len(tokens), block):
        texts.append(row.push(tokens[start : start + block]))
        if row.finish_reason:
            break
    return row, texts


@pytest.mark.parametrize(
    ("tokens", "rule", "taken", "reason"),
    [
        ([5, 6, 2, 7, 8], StopRule(10, EOS), [5, 6], "eos"),
        ([2], StopRule(10, EOS), [], "eos"),
        ([5, 2, 7], StopRule(3), [5, 2, 7], "length"),
        ([5, 6, 2], StopRule(2, EOS), [5, 6], "length"),
    ],
)
def test_where_a_row_ends(tokens: list[int], rule: StopRule, taken: list[int], reason: str) -> None:
    row, texts = run(None, tokens, rule)
    assert (row.tokens, row.finish_reason, row.text, texts) == (taken, reason, None, [None])
    with pytest.raises(AssertionError):
        row.push([5])


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    block=st.integers(1, 20),
    most=st.integers(1, 50),
)
def test_blocks_do_not_matter(tokens: list[int], block: int, most: int) -> None:
    in_blocks, _ = run(None, tokens, StopRule(most, EOS), block)
    at_once, _ = run(None, tokens, StopRule(most, EOS), 1000)
    assert (in_blocks.tokens, in_blocks.finish_reason) == (at_once.tokens, at_once.finish_reason)
    assert len(in_blocks.tokens) <= most


def test_a_stop_string_across_blocks_cuts_text_and_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one\nQ: two")[1:]
    row, texts = run(tokenizer, tokens, StopRule(100, EOS, ("\nQ:",)))
    assert row.text == "one"
    assert tokenizer.decode(row.tokens) == "one\nQ:", "with what completed the stop string"
    assert row.finish_reason == "stop"
    assert texts == ["one", ""], "what may become the stop string is held back"


def test_what_was_held_back_comes_when_it_was_no_stop_string(tokenizer: Tokenizer) -> None:
    row, texts = run(tokenizer, tokenizer.encode("one\nQ two")[1:], StopRule(9, EOS, ("\nQ:",)))
    assert (texts, row.finish_reason) == (["one", "\nQ tw", "o"], "length")
    _, texts = run(tokenizer, [*tokenizer.encode("one\n")[1:], 2], StopRule(9, EOS, ("\nQ:",)))
    assert texts == ["one", "\n"], "the end of the text lets go of it"


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    row, _ = run(tokenizer, tokenizer.encode("xabc")[1:], StopRule(99, EOS, ("abc", "c")))
    assert row.text == "x"


ALPHABET = "ab\u20ac"


@example(text="aab", stop=["aab"], block=1)
@given(
    text=st.text(ALPHABET, max_size=30),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    block=st.integers(1, 9),
)
@with_fixture
def test_stop_strings_over_many_texts(
    tokenizer: Tokenizer, text: str, stop: list[str], block: int
) -> None:
    tokens = [*tokenizer.encode(text)[1:], 2]
    row, texts = run(tokenizer, tokens, StopRule(1000, EOS, tuple(stop)), block)
    # The first stop string to be complete ends the text; of those complete at the same character,
    # the longest begins first.
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    assert row.text == (text[: min(ends)[1]] if ends else text)
    assert row.finish_reason == ("stop" if ends else "eos")
    assert "".join(t or "" for t in texts) == row.text, "nothing handed out is ever taken back"


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, words: list[str]) -> None:
        self.push, self.flush = words.__getitem__, str


@example(words=["bab", "a"], stop=["bab"])
@given(
    words=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1),
    stop=st.lists(st.text("ab", min_size=1, max_size=4)),
)
def test_stop_strings_inside_and_across_words(words: list[str], stop: list[str]) -> None:
    """The word that completes the first ends the row; the text ends before the earliest in it."""
    row = Continuation(StopRule(1000, stop=tuple(stop)), cast(IncrementalText, Words(words)))
    handed = [row.push([number]) or "" for number in range(len(words)) if not row.finish_reason]
    texts = ["".join(words[: n + 1]) for n in range(len(words))]
    ends = [(n, text.find(s)) for n, text in enumerate(texts) for s in stop if s in text]
    assert (row.finish_reason, len(row.tokens)) == (
        ("stop", min(ends)[0] + 1) if ends else (None, len(words))
    )
    assert row.text == (texts[-1][: min(ends)[1]] if ends else texts[-1])
    assert (row.text or "").startswith("".join(handed)), "nothing handed out is ever taken back"


def test_half_a_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("€")[1:3]
    row, texts = run(tokenizer, [*half, 2], StopRule(9, EOS), block=2)
    assert texts == ["", "\ufffd"]
    assert row.text == "\ufffd"


# A row


def row(mode: str = "diffusion", **options: Any) -> Row:
    config = GenerationConfig(mode=mode, max_new_tokens=20, block_size=16, **options)
    return Row(3, [5, 6, 7], config, model=fake_config(), tokenizer=None)


def test_a_row_knows_how_much_of_its_text_is_read() -> None:
    rows = [row(), row("ar"), row("auto")]
    assert [(r.width, r.end) for r in rows] == [(16, 3 + 16), (1, 3 + 19), (16, 3 + 16)]


def test_a_row_gives_an_event_for_each_block_and_its_result_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("twotower.runtime.rows.perf_counter", lambda: next(clock))
    one = row(temperature=1.0, seed=9)
    one.start()
    one.seconds["prefill"] = 0.25
    one.nfe = 4
    assert one.accept([5] * 16) == BlockEvent(3, (5,) * 16, None, finished=False, result=None)
    assert (one.live, one.blocks, one.batch_passes) == (True, 1, 0)
    last = one.accept([6] * 3 + [2])
    assert (last.row, last.tokens, last.finished, one.live) == (3, (6,) * 3, True, False)
    assert last.result == Generation(
        tokens=(5,) * 16 + (6,) * 3,
        text=None,
        finish_reason="eos",
        usage=Usage(3, 19, 4, 2),
        timings=Timings(250.0, 0.0, 0.0, 2500.0),
        seed=9,
    )


def test_a_row_begins_again_in_another_mode() -> None:
    greedy = row("auto", ignore_eos=True)
    greedy.accept([5, 2])
    again = greedy.in_mode("ar")
    assert (again.index, again.prompt.tolist(), again.config.mode) == (3, [5, 6, 7], "ar")
    assert (again.seed, again.nfe, again.blocks, greedy.blocks) == (None, 0, 0, 0)
    assert again.accept([2] * 20).tokens == (2,) * 20
    assert greedy.accept([5]).tokens == (5,)
