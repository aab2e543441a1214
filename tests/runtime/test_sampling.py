"""The choice of an autoregressive token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from twotower.config import GenerationConfig
from twotower.runtime import sampling as sampling_module
from twotower.runtime.noise import AR, gumbel_noise
from twotower.runtime.sampling import Sampling


def sampling(**options: Any) -> Sampling:
    return Sampling.from_config(GenerationConfig(**{"seed": 0, **options}))


IDS = np.array([40, 30, 20, 10])
LOGPROBS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def choices(count: int = 4000, **options: Any) -> dict[int, float]:
    policy = sampling(mode="ar", **options)
    drawn = [policy.choose(IDS, LOGPROBS, index=i) for i in range(count)]
    return {t: drawn.count(t) / count for t in sorted(set(drawn))}


def test_greedy_takes_the_best() -> None:
    assert choices(5) == {40: 1.0}
    assert choices(50, temperature=1.0, top_k=1) == {40: 1.0}
    assert choices(50, temperature=1e-300) == {40: 1.0}
    assert choices(50, temperature=1.0, top_p=0.01) == {40: 1.0}


def test_sampling_follows_the_probabilities() -> None:
    assert choices(temperature=1.0) == pytest.approx(
        {10: 0.1, 20: 0.15, 30: 0.25, 40: 0.5}, abs=0.03
    )
    squared = np.array([0.01, 0.0225, 0.0625, 0.25])
    assert choices(temperature=0.5) == pytest.approx(
        dict(zip((10, 20, 30, 40), squared / squared.sum(), strict=True)), abs=0.03
    )


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert choices(temperature=1.0, top_k=2) == pytest.approx({30: 1 / 3, 40: 2 / 3}, abs=0.03)
    # 0.5 alone is short of 0.6: the next candidate, which crosses it, still counts.
    assert choices(temperature=1.0, top_p=0.6) == pytest.approx({30: 1 / 3, 40: 2 / 3}, abs=0.03)
    assert set(choices(temperature=1.0, top_p=0.8)) == {20, 30, 40}


def test_of_equal_candidates_the_first_may_be_enough() -> None:
    policy = sampling(mode="ar", temperature=1.0, top_p=0.5)
    assert {policy.choose(np.array([7, 8]), np.log([0.5, 0.5]), index=i) for i in range(50)} == {7}


def test_a_choice_is_that_of_its_seed_and_place() -> None:
    """Texts of a seed do not change from version to version."""
    policy = sampling(mode="ar", temperature=0.5, seed=11)
    for index in range(50):
        best = int(np.argmax(2 * LOGPROBS.astype(np.float64) + gumbel_noise(11, (0, index, AR), 4)))
        assert policy.choose(IDS, LOGPROBS, index=index) == IDS[best]


def test_a_seed_is_drawn_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 53 bits, which every reader of JSON keeps."""
    monkeypatch.setattr(sampling_module.secrets, "randbits", lambda bits: 2**bits - 1)
    assert sampling(temperature=1.0, seed=None).seed == 2**53 - 1
    assert sampling(temperature=1.0, seed=5).seed == 5
    greedy = sampling(temperature=0.0, seed=None)
    assert (greedy.seed, greedy.temperature, greedy.greedy) == (0, 0.0, True)
