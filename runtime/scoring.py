"""Likelihood of given continuations: autoregression whose choices are made beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig
from twotower.errors import RequestError
from twotower.runtime.requests import (
    Limits,
    Request,
    check_vocabulary,
    row_from_request,
    token_ids,
)
from twotower.runtime.rows import Row

_ROUNDING = 4e-6
"""How far a sum of the candidates' probabilities can be off, since their logarithms are float32."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a continuation is.

    Attributes:
        logprobs: Natural logarithm of each token's probability, given everything before it.
        greedy: Whether every token was the most likely one.
        bounded: Tokens that were not among the 64 candidates the engine returns. Their entry in
            `logprobs` is an upper bound: the smaller of the least likely candidate's value and that
            of all probability the candidates leave.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: bool
    bounded: int

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation; 0 for an empty one."""
        return math.fsum(self.logprobs)


class GivenTokens:
    """The choices of a row that are made already; notes how likely each token was."""

    temperature = 0.0
    greedy = True

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._logprobs: list[float] = []
        self._best = True
        self._bounded = 0

    def choose(self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[Any], *, index: int) -> int:
        """The given token, whatever the candidates are; see `Sampling.choose`."""
        token = self._tokens[index]
        (places,) = np.nonzero(ids == token)
        if len(places):
            self._logprobs.append(float(logprobs[places[0]]))
            self._best = self._best and int(places[0]) == 0
        else:
            # No other token is likelier than the last candidate, nor than all that they leave.
            # Rounding must not make the bound too low, or take the logarithm of 0.
            values = logprobs.astype(np.float64)
            left = max(1.0 - float(np.exp(values).sum()), 0.0) + _ROUNDING
            self._logprobs.append(min(float(values.min()), math.log(left)))
            self._best, self._bounded = False, self._bounded + 1
        return token

    def score(self) -> Score:
        """What was noted."""
        return Score(
            tuple(self._tokens),
            tuple(self._logprobs),
            self._best,
            self._bounded,
        )


def scoring_rows(pairs: Any, limits: Limits) -> tuple[list[GivenTokens], list[Row]]:
    """What notes how likely each pair's continuation is, and the rows that read them.

    A pair without continuation needs no row.

    Raises:
        RequestError: a pair is malformed, out of range or too long, or needs a tokenizer that is
            not there.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise _not_a_pair("this", pairs)
    given, rows = [], []
    for i, pair in enumerate(pairs):
        context, continuation = _tokenized(i, pair, limits)
        given.append(GivenTokens(continuation))
        if continuation:
            config = GenerationConfig(mode="ar", max_new_tokens=len(continuation), ignore_eos=True)
            row = row_from_request(i, Request(context, config), limits)
            row.sampling = given[-1]
            rows.append(row)
    return given, rows


def _tokenized(index: int, pair: Any, limits: Limits) -> tuple[list[int], list[int]]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise _not_a_pair(f"pair {index}", pair)
    context, continuation = pair
    if isinstance(context, str) != isinstance(continuation, str):
        raise RequestError(
            "a context and its continuation must be of one kind",
            found=f"a {type(context).__name__} and a {type(continuation).__name__} in pair {index}",
            do="pass two texts or two lists of token ids",
        )
    if isinstance(context, str) and continuation:
        before, after = _cut_texts(context, continuation, limits)
    else:
        before = token_ids(context, limits)
        after = token_ids(continuation, limits) if continuation != "" else []
    before = before or [limits.model.bos_token_id]
    check_vocabulary(before, f"the context of pair {index}", limits)
    check_vocabulary(after, f"the continuation of pair {index}", limits)
    if len(before) + len(after) > limits.max_context:
        raise RequestError(
            f"pair {index} is too long: {len(before)} tokens of context and {len(after)} of "
            "continuation",
            found=f"this session holds {limits.max_context} tokens a text, context and "
            "continuation together",
            do="shorten the context from its beginning, or open the session with a larger "
            "max_context",
        )
    return before, after


def _cut_texts(context: str, continuation: str, limits: Limits) -> tuple[list[int], list[int]]:
    """Tokens of both texts together, cut at the context's length, as lm-evaluation-harness does.

    The context's trailing spaces go with the continuation: most tokenizers write a space with the
    word after it.
    """
    before, whole = token_ids(context.rstrip(), limits), token_ids(context + continuation, limits)
    if not before and whole[:1] == [limits.model.bos_token_id]:
        before = whole[:1]  # an empty context is the BOS token, and here the continuation brings it
    return before, whole[len(before) :]


def _not_a_pair(what: str, value: object) -> RequestError:
    return RequestError(
        f"{what} is not a context with its continuation",
        found=repr(value)[:80],
        do="pass a tuple (context, continuation) of two texts or two lists of token ids, or a list "
        "of such tuples",
    )
