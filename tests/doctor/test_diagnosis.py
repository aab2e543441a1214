"""Verdicts from answers: what rounding explains and what not, and how a wrong engine looks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from twotower.doctor.diagnosis import Comparison, Observed, compare, symptoms_of
from twotower.doctor.known_answer import Answer, Pass
from twotower.doctor.known_issues import Symptom

SOUND = Comparison(first=None, error=0.0)
KNOWN = Answer(
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


def seen(
    short: Comparison = SOUND, long: Comparison = SOUND, *, dtype: str = "float32", **more: object
) -> Observed:
    return Observed(dtype=dtype, short=short, long=long, **more)  # type: ignore[arg-type]


def far(first: int | None) -> Comparison:
    return Comparison(first=first, error=1.0)


@pytest.mark.parametrize(
    ("observed", "want"),
    [
        (seen(), ()),
        (seen(far(0)), (Symptom.FIRST,)),
        (seen(far(7)), (Symptom.LATER,)),
        (seen(long=far(30)), (Symptom.GROWN,)),
        (seen(long=far(0)), (Symptom.FIRST,)),
        (
            seen(Comparison(first=0, error=math.inf, finite=False)),
            (Symptom.NOT_FINITE, Symptom.FIRST),
        ),
        (seen(Comparison(first=0, error=0.5, zeros=True)), (Symptom.ZEROS, Symptom.FIRST)),
        (seen(Comparison(first=1, error=0.5, constant=True)), (Symptom.CONSTANT, Symptom.LATER)),
        (seen(far(0), plain=SOUND), (Symptom.GRAPHS, Symptom.FIRST)),
        (seen(far(0), plain=far(0)), (Symptom.FIRST,)),
        (seen(far(0), company_right=True, company=False), (Symptom.FIRST, Symptom.ALONE)),
        (seen(company=False, padded=False), (Symptom.COMPANY,)),
        (seen(company=True, padded=False), (Symptom.PADDED,)),
        (seen(Comparison(first=3, error=1e-7)), (Symptom.LATER,)),
        (seen(Comparison(first=3, error=0.01), dtype="float16"), ()),
        (seen(Comparison(first=3, error=0.01), dtype="bfloat16"), ()),
        (seen(Comparison(first=None, error=0.01)), (Symptom.FIRST,)),
        (seen(far(3), dtype="float16"), (Symptom.LATER,)),
    ],
)
def test_symptoms(observed: Observed, want: tuple[Symptom, ...]) -> None:
    assert symptoms_of(observed) == want


def test_the_same_answer_has_no_distance() -> None:
    assert compare(KNOWN, KNOWN) == Comparison(first=None, error=0.0)


def test_numbers_are_compared_while_they_come_from_the_same_blocks() -> None:
    """The third pass began from another block: its confidences say nothing."""
    other = replace(KNOWN.passes[2], block_in=(9, 3), confidence=(0.0, 0.0))
    got = replace(
        KNOWN,
        passes=(*KNOWN.passes[:2], other),
        logprobs=(-0.1, -0.25, -0.35),
        ar_tokens=(7, 8, 11),
    )
    result = compare(KNOWN, got)
    assert result.first == 2
    assert result.error == pytest.approx(0.05)


def test_one_far_number_is_a_close_call_and_not_an_error() -> None:
    assert compare(KNOWN, replace(KNOWN, logprobs=(-0.1, -0.2, -5.0))).error == 0.0
    assert compare(KNOWN, replace(KNOWN, logprobs=(-1.1, -0.2, -5.0))).error == pytest.approx(1.0)


def test_what_a_dead_engine_returns_is_seen() -> None:
    zeros = tuple(replace(p, confidence=(0.0, 0.0)) for p in KNOWN.passes)
    got = compare(KNOWN, replace(KNOWN, tokens=(0, 0, 0, 0), passes=zeros))
    assert got.zeros and got.constant and got.first == 0
    assert not compare(KNOWN, replace(KNOWN, logprobs=(math.nan, 0.0, 0.0))).finite
