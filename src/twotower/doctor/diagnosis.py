"""From an engine's answers to a verdict: equal, rounded, or wrong, and what a wrong one looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twotower.doctor.known_answer import Answer
from twotower.doctor.known_issues import Symptom

__all__ = ["TOLERANCE", "Comparison", "Observed", "compare", "symptoms_of"]

TOLERANCE = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.12}
"""Largest median difference of confidences, or of log-probabilities in nats, that rounding explains, by the engine's element type.

float32 has room for another order of summation and not for TF32, whose products keep ten bits. The
others have twice what rounding every result costs the models of this repository at worst (0.015 and
0.058, by twotower.evaluate.half_precision); one wrong token in a short prompt costs 0.11 to 0.27.
An engine that is wrong in a few places only is not found by this, but by its tokens in float32.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answer against the known one.

    Attributes:
        first: The first token that differs, by diffusion or autoregressively; None if all are
            equal.
        error: Median difference of the numbers behind them, as far as both computed them from the
            same tokens.
        finite: Whether every number is one.
        zeros: Whether every confidence is zero, and
        constant: whether the text is one token over and over and the known one is not.
    """

    first: int | None
    error: float
    finite: bool = True
    zeros: bool = False
    constant: bool = False

    def wrong(self, dtype: str) -> bool:
        """Whether more than rounding is at work: float32 tokens must be equal, narrower ones may part on a close call."""
        explained = self.finite and not self.zeros and self.error <= TOLERANCE[dtype]
        return not explained or (dtype == "float32" and self.first is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything seen of one engine.

    Attributes:
        dtype: Its element type.
        short: The short text alone.
        long: The one that outgrows a bucket of the cache, alone.
        company: Whether the short text, among others as short, is what it is alone; likewise
        padded: beside a much longer one. None where it was not tried.
        company_right: Whether the short text in company is the known one.
        plain: The short text without CUDA graphs; None where there are none.
    """

    dtype: str
    short: Comparison
    long: Comparison
    company: bool | None = None
    padded: bool | None = None
    company_right: bool | None = None
    plain: Comparison | None = None


def compare(known: Answer, got: Answer) -> Comparison:
    """Holds an answer against the known one; `got` must have scored the known one's tokens."""
    numbers = [c for p in got.passes for c in p.confidence] + list(got.logprobs)
    finite = bool(np.isfinite(numbers).all())
    firsts = [
        f
        for f in (
            _first_difference(known.tokens, got.tokens),
            _first_difference(known.ar_tokens, got.ar_tokens),
        )
        if f is not None
    ]
    return Comparison(
        first=min(firsts, default=None),
        error=_typical_error(known, got) if finite else float("inf"),
        finite=finite,
        zeros=bool(got.passes) and all(c == 0 for p in got.passes for c in p.confidence),
        constant=len(set(got.tokens)) == 1 and len(set(known.tokens)) > 1,
    )


def symptoms_of(seen: Observed) -> tuple[Symptom, ...]:
    """What is wrong, most telling first; nothing for a sound engine."""
    out: list[Symptom] = []
    worst = [c for c in (seen.short, seen.long) if c.wrong(seen.dtype)]
    if any(not c.finite for c in worst):
        out.append(Symptom.NOT_FINITE)
    if any(c.zeros for c in worst):
        out.append(Symptom.ZEROS)
    if any(c.constant for c in worst):
        out.append(Symptom.CONSTANT)
    if seen.plain is not None and seen.short.wrong(seen.dtype) and not seen.plain.wrong(seen.dtype):
        out.append(Symptom.GRAPHS)
    if seen.short.wrong(seen.dtype):
        out.append(Symptom.LATER if (seen.short.first or 0) > 0 else Symptom.FIRST)
        if seen.company_right:
            out.append(Symptom.ALONE)
    elif seen.long.wrong(seen.dtype):
        out.append(Symptom.GROWN if (seen.long.first or 0) > 0 else Symptom.FIRST)
    if not seen.short.wrong(seen.dtype) and seen.company is False:
        out.append(Symptom.COMPANY)
    if not seen.short.wrong(seen.dtype) and seen.company is not False and seen.padded is False:
        out.append(Symptom.PADDED)
    return tuple(out)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    if a == b:
        return None
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _typical_error(known: Answer, got: Answer) -> float:
    """The larger of the median differences: of log-probabilities, and of confidences in passes that began from the same blocks.

    Medians, because experts are chosen: a close call between two of them goes the other way by
    rounding alone, and then this one position is far off. An engine that is wrong is wrong at most
    positions.
    """
    confidences: list[float] = []
    for want, have in zip(known.passes, got.passes, strict=False):
        if want.block_in != have.block_in:
            break
        confidences += np.abs(np.subtract(want.confidence, have.confidence)).tolist()
    logprobs = np.abs(np.subtract(known.logprobs, got.logprobs))
    return float(max(np.median(confidences) if confidences else 0.0, np.median(logprobs)))
