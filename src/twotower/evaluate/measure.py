"""Running a suite: every problem by every run in turn, so that system noise affects all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig
from twotower.errors import RequestError
from twotower.evaluate.suite import Problem, judge
from twotower.runtime import TwoTower

_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Run:
    """A model with options: a named way to answer."""

    name: str
    model: TwoTower
    config: GenerationConfig


@dataclass(slots=True)
class Measured:
    """What one run did, problem by problem, [N] each.

    `degenerate` texts ran into a loop; `nfe` counts passes as `Usage.nfe` does; `ms` is from start
    to end, `prefill_ms` the prompt's share of it.
    """

    right: npt.NDArray[np.bool_]
    degenerate: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    nfe: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]
    ms: npt.NDArray[np.float64]
    prefill_ms: npt.NDArray[np.float64]
    texts: list[str]

    @classmethod
    def empty(cls, count: int) -> Measured:
        """Room for so many problems."""
        flags, whole, real = (
            np.zeros((2, count), bool),
            np.zeros((3, count), np.int64),
            np.zeros((2, count)),
        )
        return cls(
            flags[0],
            flags[1],
            whole[0],
            whole[1],
            whole[2],
            real[0],
            real[1],
            [""] * count,
        )

    def take(self, chosen: npt.NDArray[Any]) -> Measured:
        """The chosen problems (a boolean mask or indices)."""
        texts = [self.texts[i] for i in np.arange(len(self.texts))[chosen]]
        return Measured(
            self.right[chosen],
            self.degenerate[chosen],
            self.tokens[chosen],
            self.nfe[chosen],
            self.blocks[chosen],
            self.ms[chosen],
            self.prefill_ms[chosen],
            texts,
        )


def measure(
    problems: Sequence[Problem],
    runs: Sequence[Run],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measured]:
    """Answers every problem with every run, one request at a time.

    The first problems are answered once without being counted: engines bind their buffers and pages
    are read then.

    Raises:
        RequestError: a model has no tokenizer, or a prompt does not fit.
    """
    for run in runs:
        if run.model.tokenizer is None:
            raise RequestError(
                "this suite needs text, and the bundle has no tokenizer",
                found="problems are written as text",
                do="export a checkpoint that has a tokenizer.json",
            )
    out = {c.name: Measured.empty(len(problems)) for c in runs}
    for problem in problems[:_WARM_UP]:
        for run in runs:
            run.model.generate(problem.prompt, run.config)
    for i, problem in enumerate(problems):
        # Each problem starts with another run: none is always the one that finds the caches
        # cold.
        for j in range(len(runs)):
            run = runs[(i + j) % len(runs)]
            _answer(problem, run, out[run.name], i)
        if progress is not None:
            progress(i + 1, len(problems))
    return out


def _answer(
    problem: Problem,
    run: Run,
    into: Measured,
    at: int,
) -> None:
    result = run.model.generate(problem.prompt, run.config)
    assert result.text is not None
    verdict = judge(problem, result.text, result.tokens)
    into.right[at], into.degenerate[at] = verdict.right, verdict.degenerate
    into.tokens[at], into.nfe[at], into.blocks[at] = (
        len(result.tokens),
        result.usage.nfe,
        result.usage.blocks,
    )
    into.ms[at], into.prefill_ms[at] = result.timings.total, result.timings.prefill
    into.texts[at] = result.text
