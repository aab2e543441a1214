"""Running a suite: every problem by every run in turn, so that system noise affects all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
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


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run did, problem by problem, [N] each.

    `degenerate` texts ran into a loop; `nfe` counts passes as `Usage.nfe` does; `ms` is from start
    to end, `prefill_ms` the prompt's share of it; `texts` are objects.
    """

    right: npt.NDArray[np.bool_]
    degenerate: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    nfe: npt.NDArray[np.int64]
    blocks: npt.NDArray[np.int64]
    ms: npt.NDArray[np.float64]
    prefill_ms: npt.NDArray[np.float64]
    texts: npt.NDArray[np.object_]

    @classmethod
    def of(cls, answers: Sequence[tuple[Any, ...]]) -> Measured:
        """The fields of one answer after another, in their order."""
        columns = zip(zip(*answers, strict=True), _KINDS, strict=True)
        return cls(*(np.array(column, kind) for column, kind in columns))

    def take(self, chosen: npt.NDArray[Any]) -> Measured:
        """The chosen problems (a boolean mask or indices)."""
        return Measured(*(getattr(self, field.name)[chosen] for field in fields(self)))


_KINDS = (
    bool,
    bool,
    np.int64,
    np.int64,
    np.int64,
    np.float64,
    np.float64,
    object,
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
    answers: dict[str, list[tuple[Any, ...]]] = {run.name: [] for run in runs}
    for problem in problems[:_WARM_UP]:
        for run in runs:
            run.model.generate(problem.prompt, run.config)
    for i, problem in enumerate(problems):
        # Each problem starts with another run: none is always the one that finds the caches cold.
        for j in range(len(runs)):
            run = runs[(i + j) % len(runs)]
            answers[run.name].append(_answer(problem, run))
        if progress is not None:
            progress(i + 1, len(problems))
    return {name: Measured.of(some) for name, some in answers.items()}


def _answer(problem: Problem, run: Run) -> tuple[Any, ...]:
    """The fields of `Measured`."""
    result = run.model.generate(problem.prompt, run.config)
    assert result.text is not None
    verdict = judge(problem, result.text, result.tokens)
    return (
        verdict.right,
        verdict.degenerate,
        len(result.tokens),
        result.usage.nfe,
        result.usage.blocks,
        result.timings.total,
        result.timings.prefill,
        result.text,
    )
