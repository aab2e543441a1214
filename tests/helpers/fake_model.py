"""A fake model with known answers, errors, passes and milliseconds."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, Self

from twotower.config import GenerationConfig
from twotower.evaluate.suite import Problem
from twotower.runtime import Generation, Timings, Usage
from twotower.runtime.auto import PassRecord, PassTimes

AR_MS, PASS_MS, EXTEND_MS = 1.0, 2.0, 1.0


def problem(kind: str, number: int, length: Literal["in", "out"] = "in") -> Problem:
    """A problem with an answer of twenty words."""
    return Problem(
        f"{kind}-{number}",
        kind,
        f"Q: {kind} {number}",
        " ".join(f"{kind}{number}" for _ in range(20)),
        length,
    )


@dataclass
class FakeModel:
    """Diffusion takes more passes and is less often wrong the higher the threshold.

    Attributes:
        problems: What it knows.
        wrong_below: A diffusion answer is wrong where the problem's own difficulty (0 to 1) is
            above the threshold plus this.
        calls: (prompt, mode, threshold, steps) of every request.
        seeds: Their seeds.
    """

    problems: tuple[Problem, ...]
    wrong_below: float = 0.0
    ar_wrong: frozenset[str] = frozenset()
    defaults: GenerationConfig = field(default_factory=GenerationConfig)
    target: str = "fake"
    tokenizer: Any = "yes"
    calls: list[tuple[str, str, float, int]] = field(default_factory=list)

    seeds: list[int | None] = field(default_factory=list)

    def generate(self, prompt: str, config: GenerationConfig) -> Generation:
        self.calls.append(
            (prompt, config.mode, config.confidence_threshold, config.steps_per_block)
        )
        self.seeds.append(config.seed)
        asked = next(p for p in self.problems if p.prompt == prompt)
        tokens = tuple(range(20))
        blocks = 2
        if config.mode == "ar":
            right, passes, ms = asked.id not in self.ar_wrong, 20, 20 * AR_MS
            blocks = 0
        else:
            right = difficulty(asked) <= config.confidence_threshold + self.wrong_below
            passes = blocks * min(
                config.steps_per_block, 1 + round(10 * config.confidence_threshold)
            )
            ms = passes * PASS_MS + blocks * EXTEND_MS
        text = f" {asked.answer}" if right else " something else"
        usage, timings = Usage(5, len(tokens), passes, blocks), Timings(0.5, ms, 0.0, ms)
        return Generation(tokens, text, "eos", usage, timings, mode=config.mode)

    def pass_record(self) -> PassRecord:
        times = PassTimes(denoise_ms=PASS_MS, extend_ms=EXTEND_MS, step_ms=AR_MS)
        return PassRecord({"target": self.target}, {16: {1: times}})

    def score(self, pair: tuple[str, str]) -> Any:
        return SimpleNamespace(logprobs=(-0.5, -0.25), total=-0.75, greedy=True, bounded=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def difficulty(asked: Problem) -> float:
    """A number from 0 to 1 that belongs to the problem."""
    return (zlib.crc32(asked.id.encode()) % 1000) / 1000
