"""Keyed noise and the choice of an autoregressive token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.config import GenerationConfig
from twotower.runtime.sampler import Sampling, gumbel_noise, keyed_uniforms


def sampling(**options: Any) -> Sampling:
    return Sampling.from_config(GenerationConfig(**{"seed": 0, **options}))


def noise(rows: int = 4, *, block: int = 0, step: int = 0, **options: Any) -> np.ndarray:
    out = np.full((rows, 8), 9, np.float32)
    sampling(**options).write_noise(out, block=block, step=step)
    return out


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as published (Salmon et al., 2011), in whole numbers."""
    low = 2**64 - 1
    for _ in range(10):
        a, b = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [(b >> 64) ^ counter[1] ^ key[0], b & low, (a >> 64) ^ counter[3] ^ key[1], a & low]
        key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
    return counter


def test_the_stream_is_philox_whatever_numpy_does() -> None:
    assert [f"{x:x}" for x in philox([0, 0, 0, 0], [0, 0])] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    bits = [x for draw in (1, 2) for x in philox([draw, 1, 2, 3], [5, 0])]
    assert keyed_uniforms(5, (1, 2, 3), 8).tolist() == [((x >> 11) + 0.5) / 2**53 for x in bits]


def test_what_the_noise_is_keyed_by_is_pinned() -> None:
    expected = -np.log(-np.log(keyed_uniforms(7, (3, 2, 0), 32))).reshape(4, 8)  # step, block, mode
    assert np.array_equal(noise(temperature=1.0, seed=7, block=2, step=3), expected.astype(np.float32))


def test_noise_is_standard_gumbel() -> None:
    values = gumbel_noise(3, (0, 0, 0), 200_000)
    assert values.mean() == pytest.approx(0.5772, abs=0.01)
    assert values.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert np.isfinite(values).all()


@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 9))
def test_noise_is_named_by_seed_block_and_step(seed: int, block: int, step: int) -> None:
    mine = noise(temperature=1.0, seed=seed, block=block, step=step)
    assert np.array_equal(mine, noise(temperature=1.0, seed=seed, block=block, step=step))
    others = [(seed ^ 1, block, step), (seed, block + 1, step), (seed, block, step + 1)]
    assert all(not np.array_equal(mine, noise(temperature=1.0, seed=s, block=b, step=t)) for s, b, t in others)
    assert np.array_equal(mine[:2], noise(2, temperature=1.0, seed=seed, block=block, step=step)), "a position's noise ignores S"


def test_temperature_zero_has_no_noise() -> None:
    assert not noise(temperature=0, top_k=3).any()


def test_top_k_excludes_the_other_candidates() -> None:
    cut, full = noise(temperature=1.0, top_k=3), noise(temperature=1.0)
    assert np.isneginf(cut[:, 3:]).all()
    assert np.array_equal(cut[:, :3], full[:, :3])


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
    assert choices(temperature=1.0) == pytest.approx({10: 0.1, 20: 0.15, 30: 0.25, 40: 0.5}, abs=0.03)
    squared = np.array([0.01, 0.0225, 0.0625, 0.25])
    assert choices(temperature=0.5) == pytest.approx(dict(zip((10, 20, 30, 40), squared / squared.sum(), strict=True)), abs=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert choices(temperature=1.0, top_k=2) == pytest.approx({30: 1 / 3, 40: 2 / 3}, abs=0.03)
    # 0.5 alone is short of 0.6: the next candidate, which crosses it, still counts.
    assert choices(temperature=1.0, top_p=0.6) == pytest.approx({30: 1 / 3, 40: 2 / 3}, abs=0.03)
    assert set(choices(temperature=1.0, top_p=0.8)) == {20, 30, 40}


def test_the_two_modes_do_not_share_noise() -> None:
    diffusion = noise(1, temperature=1.0, block=0, step=0)[0]
    assert not np.allclose(diffusion, gumbel_noise(0, (0, 0, 1), 8))
