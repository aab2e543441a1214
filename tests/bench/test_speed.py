"""What is measured is the same in every run, so that runs compare; and processes of their own."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from tests.helpers.fake_engines import fake_towers
from twotower.bench import measure_generation
from twotower.bench.speed import run_measured
from twotower.config import GenerationConfig
from twotower.errors import BuildError
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


def hold(mebibytes: int, seconds: float) -> None:
    kept = b"\x01" * (mebibytes << 20)
    time.sleep(seconds)
    assert len(kept) == mebibytes << 20


def fail(code: int) -> None:
    sys.exit(code)


@pytest.mark.slow
def test_what_a_process_holds_is_seen() -> None:
    seconds, idle = run_measured(hold, 0, 0.1)
    assert seconds >= 0.1
    _, held = run_measured(hold, 256, 0.3)
    assert held - idle > 200 << 20


def test_a_failure_is_an_error_and_not_a_number() -> None:
    with pytest.raises(BuildError, match="measured process failed") as caught:
        run_measured(fail, 3)
    assert "3" in caught.value.found
