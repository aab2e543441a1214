"""How often two engines of one model write the same tokens, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from twotower.doctor.checks import first_difference
from twotower.evaluate.suite import Problem
from twotower.runtime import TwoTower

__all__ = ["Agreement", "Divergence", "measure_agreement"]

_ROWS = 8
_MAX_NEW_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Divergence:
    """A prompt on which the tokens differ, and the position of the first that does."""

    problem: str
    token: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """The prompts answered in one mode, and where the answers diverge."""

    mode: str
    prompts: int
    divergences: tuple[Divergence, ...]

    @property
    def percent(self) -> float:
        """Prompts with equal tokens, in percent."""
        return 100 * (self.prompts - len(self.divergences)) / self.prompts


def measure_agreement(
    reference: TwoTower, other: TwoTower, problems: Sequence[Problem]
) -> tuple[Agreement, ...]:
    """Answers every problem with both, in diffusion mode with the reference's defaults and in `ar`.

    Args:
        reference: The model to agree with.
        other: The same model, computed by another engine.
        problems: The prompts; their answers do not matter.
    """
    out = []
    for mode in ("diffusion", "ar"):
        config = replace(
            reference.defaults.seeded(), mode=mode, max_new_tokens=_MAX_NEW_TOKENS, top_p=1.0
        )
        divergences = []
        for first in range(0, len(problems), _ROWS):
            batch = problems[first : first + _ROWS]
            prompts = [p.prompt for p in batch]
            wanted, got = (model.generate(prompts, config) for model in (reference, other))
            for problem, a, b in zip(batch, wanted, got, strict=True):
                at = first_difference(a.tokens, b.tokens)
                if at is not None:
                    divergences.append(Divergence(problem.id, at))
        out.append(Agreement(mode, len(problems), tuple(divergences)))
    return tuple(out)
