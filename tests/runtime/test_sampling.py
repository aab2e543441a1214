"""The choice of an autoregressive token, and keyed noise to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.config import GenerationConfig
from twotower.runtime import sampling as sampling_module
from twotower.runtime.sampling import (
    AR,
    DIFFUSION,
    Sampling,
    StepNoise,
    gumbel_noise,
    keyed_uniforms,
)


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
    shares = {10: 0.1, 20: 0.15, 30: 0.25, 40: 0.5}
    assert choices(temperature=1.0) == pytest.approx(shares, abs=0.03)
    squares = sum(share**2 for share in shares.values())
    colder = {token: share**2 / squares for token, share in shares.items()}
    assert choices(temperature=0.5) == pytest.approx(colder, abs=0.03)


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


# Noise

SEEDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1])
PLACES = st.integers(0, 20) | st.integers(0, 2**40)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as published (Salmon et al., 2011), in whole numbers."""
    low = 2**64 - 1
    for _ in range(10):
        a, b = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        first, third = (b >> 64) ^ counter[1] ^ key[0], (a >> 64) ^ counter[3] ^ key[1]
        counter = [first, b & low, third, a & low]
        key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
    return counter


def alone(seed: int | None, place: tuple[int, int], size: tuple[int, int], top_k: int) -> Any:
    """What a row draws for itself, [S,K] float32."""
    if seed is None:
        return np.zeros(size, np.float32)
    block, step = place
    noise = gumbel_noise(seed, (step, block, DIFFUSION), size[0] * size[1])
    out = noise.reshape(size).astype(np.float32)
    out[:, top_k or size[1] :] = -np.inf
    return out


def drawn(seed: int, place: tuple[int, int] = (0, 0), *, rows: int = 4, top_k: int = 0) -> Any:
    """What `StepNoise` draws for one row, [S,8] float32."""
    out = np.full((1, rows, 8), 9, np.float32)
    noise = StepNoise([seed], [top_k], size=(rows, 8))
    noise.write(out, [1], block=place[0], step=place[1])
    return out[0]


def test_the_stream_is_philox_whatever_numpy_does() -> None:
    known = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    assert " ".join(f"{x:x}" for x in philox([0, 0, 0, 0], [0, 0])) == known
    bits = [x for draw in (1, 2) for x in philox([draw, 1, 2, 3], [5, 0])]
    assert keyed_uniforms(5, (1, 2, 3), 8).tolist() == [((x >> 11) + 0.5) / 2**53 for x in bits]


def test_what_the_noise_is_keyed_by_is_pinned() -> None:
    uniforms = keyed_uniforms(7, (3, 2, 0), 32)  # step, block, mode
    expected = -np.log(-np.log(uniforms)).reshape(4, 8)
    assert np.array_equal(drawn(7, (2, 3)), expected.astype(np.float32))


def test_noise_is_standard_gumbel() -> None:
    values = gumbel_noise(3, (0, 0, 0), 200_000)
    assert values.mean() == pytest.approx(0.5772, abs=0.01)
    assert values.var() == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert np.isfinite(values).all()


@given(SEEDS, st.integers(0, 9), st.integers(0, 9))
def test_noise_is_named_by_seed_block_and_step(seed: int, block: int, step: int) -> None:
    mine = drawn(seed, (block, step))
    assert not np.array_equal(mine, drawn(seed ^ 1, (block, step)))
    for place in ((block + 1, step), (block, step + 1)):
        assert not np.array_equal(mine, drawn(seed, place))
    shorter = drawn(seed, (block, step), rows=2)
    assert np.array_equal(mine[:2], shorter), "a position's noise ignores S"


def test_the_two_modes_do_not_share_noise() -> None:
    assert (DIFFUSION, AR) == (0, 1), "texts of a seed do not change from version to version"
    assert not np.allclose(drawn(0, rows=1)[0], gumbel_noise(0, (0, 0, AR), 8))


def test_top_k_excludes_the_other_candidates() -> None:
    cut, full = drawn(0, top_k=3), drawn(0)
    assert np.isneginf(cut[:, 3:]).all()
    assert np.array_equal(cut[:, :3], full[:, :3])


rows = st.tuples(st.none() | SEEDS, st.integers(0, 64))
steps = st.tuples(PLACES, PLACES, st.integers(0, 2**32 - 1), st.booleans())


@given(
    st.lists(rows, min_size=1, max_size=33),
    st.tuples(st.integers(1, 20), st.sampled_from([1, 7, 64])),
    st.lists(steps, min_size=1, max_size=5, unique_by=lambda step: step[:2]),
)
@settings(max_examples=100)
def test_a_batch_draws_what_its_rows_draw_alone(
    batch: list[tuple[int | None, int]],
    size: tuple[int, int],
    places: list[tuple[int, int, int, bool]],
) -> None:
    """Any batch, any ended rows, any order of steps, drawn ahead or when needed: to the bit."""
    noise = StepNoise(*zip(*batch, strict=True), size=size)
    out = np.full((len(batch), *size), 9, np.float32)
    for block, step, chosen, ahead in places:
        live = [chosen >> i & 1 for i in range(len(batch))]
        if ahead:  # rows may end in between
            noise.draw([1] * len(batch), block=block, step=step)
        noise.write(out, live, block=block, step=step)
        for row, (seed, top_k) in enumerate(batch):
            if live[row] or seed is None:
                expected = alone(seed, (block, step), size, top_k)
                assert np.array_equal(out[row], expected), (row, block, step)


def test_full_size_batches_too() -> None:
    """32 rows of 16 positions and 64 candidates: several groups of rows, the last one whole."""
    seeds, top_k = [i * 2**58 + i for i in range(32)], [0, 20] * 16
    noise, out = StepNoise(seeds, top_k, size=(16, 64)), np.empty((32, 16, 64), np.float32)
    noise.write(out, [16] * 32, block=3, step=1)
    for row, (seed, k) in enumerate(zip(seeds, top_k, strict=True)):
        assert np.array_equal(out[row], alone(seed, (3, 1), (16, 64), k))
