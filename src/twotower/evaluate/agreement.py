"""How often two ways to compute one model write the same tokens, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from twotower.evaluate.suite import Problem
from twotower.runtime import TwoTower

__all__ = ["Agreement", "Parting", "measure_agreement"]

_ROWS = 8


@dataclass(frozen=True, slots=True)
class Parting:
    """A prompt on which the tokens differ, and the first token that does."""

    problem: str
    token: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Prompts answered in one mode, and those on which the two part."""

    mode: str
    prompts: int
    partings: tuple[Parting, ...]

    @property
    def percent(self) -> float:
        """Prompts with equal tokens, in percent."""
        return 100 * (self.prompts - len(self.partings)) / self.prompts


def measure_agreement(
    reference: TwoTower,
    other: TwoTower,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 160,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Agreement, ...]:
    """Answers every problem with both, in diffusion mode with the reference's defaults and autoregressively.

    Args:
        reference: The model to agree with.
        other: The same model, computed otherwise.
        problems: The prompts; their answers do not matter.
        max_new_tokens: Longest answer.
        progress: Called with (mode, prompts done, prompts in all).
    """
    out = []
    for mode in ("diffusion", "ar"):
        options = reference.defaults.seeded()
        config = replace(options, mode=mode, max_new_tokens=max_new_tokens, top_p=1.0)
        partings: list[Parting] = []
        for first in range(0, len(problems), _ROWS):
            some = problems[first : first + _ROWS]
            pairs = zip(
                *(model.generate([p.prompt for p in some], config) for model in (reference, other)),
                strict=True,
            )
            for problem, (a, b) in zip(some, pairs, strict=True):
                if a.tokens != b.tokens:
                    partings.append(Parting(problem.id, _first_difference(a.tokens, b.tokens)))
            if progress:
                progress(mode, first + len(some), len(problems))
        out.append(Agreement(mode, len(problems), tuple(partings)))
    return tuple(out)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
