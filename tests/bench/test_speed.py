"""Measured generation: prompts and noise are the same in every run, so that runs compare."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fake_engines import fake_towers
from twotower.bench import measure_generation
from twotower.config import GenerationConfig
from twotower.runtime import TwoTower


def test_a_benchmark_measures_the_same_texts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = TwoTower.generate, []

    def noted(self: TwoTower, prompts: Any, config: GenerationConfig) -> Any:
        results = real(self, prompts, config)
        seen.append((prompts, config, [r.tokens for r in results]))
        return results

    monkeypatch.setattr(TwoTower, "generate", noted)
    config = GenerationConfig(max_new_tokens=8, temperature=2.0)
    with TwoTower.from_towers(fake_towers().towers) as model:
        for _ in range(2):
            measure_generation(model, config, prompt_tokens=5, rows=2, runs=1)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert first == second
    assert {options.seed for _, options, _ in seen} == {0}
