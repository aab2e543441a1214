"""Differences of two traces by hand, and what cannot be compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.traces import MASK, small_trace
from twotower.errors import TraceError
from twotower.trace import Trace, diff_traces


def changed(trace: Trace, number: int, **fields: Any) -> Trace:
    steps = list(trace.steps)
    steps[number] = replace(steps[number], **fields)
    return replace(trace, steps=tuple(steps))


def test_confidences_may_differ_where_every_commit_is_the_same() -> None:
    other = changed(small_trace(), 1, confidence=[0.0, 0.0, 0.69, 0.97])
    diff = diff_traces(small_trace(), other)
    assert diff.equal
    assert diff.agreed_to == pytest.approx(0.01), "positions that are filled already do not count"


def test_a_commit_on_one_side_only_is_measured_from_the_threshold() -> None:
    confidence, after = [0.95, 0.8996, 0.41, 0.6], [10, MASK, MASK, MASK]
    other = changed(small_trace(), 0, confidence=confidence, committed=[0], next=after)
    diff = diff_traces(small_trace(), other)
    assert (diff.block, diff.step, diff.position) == (0, 0, 1)
    assert (diff.margin, diff.margin_of) == (pytest.approx(0.09), "threshold")
    assert diff.sides is not None
    assert [(s.committed, s.token, s.piece, s.confidence) for s in diff.sides] == [
        (True, 11, " ", 0.99),
        (False, 11, " ", 0.8996),
    ]
    assert diff.tokens_equal, "the texts may end the same"
    assert not diff.equal


def test_other_tokens_are_measured_from_one_another() -> None:
    predicted, after = [10, 11, 12, 20], [10, 11, MASK, 20]
    confidence = [0.9, 0.9, 0.7, 0.91]
    other = changed(small_trace(), 1, predicted=predicted, next=after, confidence=confidence)
    other = replace(other, end=replace(other.end, tokens=[10, 11, 12, 20]))
    diff = diff_traces(small_trace(), other)
    assert (diff.block, diff.step, diff.position) == (0, 1, 3)
    assert (diff.margin, diff.margin_of) == (pytest.approx(0.06), "confidence")
    assert (diff.tokens_equal, diff.first_token) == (False, 3)


def test_a_pass_that_only_one_made_is_a_difference() -> None:
    shorter = replace(small_trace(), steps=small_trace().steps[:-1])
    for pair, expected in (
        ((small_trace(), shorter), [True, False]),
        ((shorter, small_trace()), [False, True]),
    ):
        diff = diff_traces(*pair)
        assert (diff.block, diff.step, diff.position, diff.margin) == (1, 2, 2, None)
        assert diff.sides is not None
        assert [s.committed for s in diff.sides] == expected


def test_a_text_that_ends_elsewhere_is_no_equal_one() -> None:
    cut = replace(small_trace(), end=replace(small_trace().end, tokens=[10, 11]))
    diff = diff_traces(small_trace(), cut)
    assert (diff.block, diff.equal, diff.first_token) == (None, False, 2)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"prompt_tokens": [1, 11]}, "prompts"),
        ({"mask_token_id": 4}, "mask tokens: 3 and 4"),
        ({"config": {"confidence_threshold": 0.8}}, "confidence_threshold: 0.9 and 0.8"),
    ],
)
def test_requests_that_differ_are_named(fields: dict[str, Any], what: str) -> None:
    other = replace(small_trace(), header=replace(small_trace().header, **fields))
    with pytest.raises(TraceError) as caught:
        diff_traces(small_trace(), other)
    assert what in caught.value.found
