"""The block loop on a toy model: the same text in any batch, and nothing done twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import fake_engines
from tests.helpers.fake_engines import FakeTowers, fake_config, fake_towers
from twotower.config import GenerationConfig
from twotower.runtime import Generation, Request, StepRecord, TwoTower
from twotower.runtime.device import HostStream
from twotower.runtime.sampling import DIFFUSION, Sampling, StepNoise, gumbel_noise
from twotower.runtime.schedule import commit_floor
from twotower.spec import CHUNK_LENGTH, HIDDEN, PAST_LENGTH, TOKENS, state_tensors


def options(**changes: Any) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": 24, "block_size": 8, "steps_per_block": 8, **changes}
    )


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(4, 97), k=length)


def run(
    requests: Sequence[Request], fake: FakeTowers | None = None, **session: Any
) -> list[Generation]:
    fake = fake or fake_towers(eos_every=40)
    with TwoTower.from_towers(fake.towers, **session) as model:
        return model.generate(list(requests))


def what(results: Sequence[Generation]) -> list[tuple[Any, ...]]:
    return [(r.tokens, r.finish_reason, r.usage) for r in results]


class Naive:
    """The algorithm said plainly: one row, and every block reads the whole text anew."""

    def __init__(self, fake: FakeTowers) -> None:
        self.fake = fake
        self.config = fake.towers.config

    def context(self, text: list[int]) -> dict[str, np.ndarray]:
        sizes = {"B": 1, "T": len(text)}
        arrays, states = {}, state_tensors(self.config, "float32")
        for t in states:
            arrays[t.past.name] = np.zeros(t.past.shape(sizes), np.float32)
            new = np.zeros(t.past.shape(sizes), np.float32)
            arrays[t.present.name] = arrays[t.past.name] if t.in_place else new
        arrays |= {
            TOKENS: np.array([text]),
            CHUNK_LENGTH: np.array([len(text)]),
            PAST_LENGTH: np.array([0]),
        }
        arrays[HIDDEN] = np.zeros((1, self.config.hidden_size), np.float32)
        self.fake.context.compute(arrays)
        present = {t.past.name: arrays[t.present.name] for t in states}
        return present | {HIDDEN: arrays[HIDDEN], "context_length": np.array([len(text)])}

    def block(self, text: list[int], config: GenerationConfig, index: int) -> tuple[list[int], int]:
        size, k = config.block_size, 64
        a = self.context(text) | {
            "block": np.full((1, size), self.config.mask_token_id),
            "threshold": np.array([config.confidence_threshold], np.float32),
            "temperature": np.array([config.temperature], np.float32),
            "commit_floor": np.zeros(1, np.int64),
            "noise": np.zeros((1, size, k), np.float32),
            **{name: np.zeros((1, size), np.int64) for name in ("next_block", "predicted")},
            "confidence": np.zeros((1, size), np.float32),
            "masked_left": np.array([size]),
        }
        for step in range(config.steps_per_block):
            left = int(a["masked_left"][0])
            a["commit_floor"][0] = commit_floor(left, step, config.steps_per_block)
            if config.temperature:
                assert config.seed is not None
                noise = gumbel_noise(config.seed, (step, index, DIFFUSION), size * k)
                a["noise"][0] = noise.reshape(size, k)
                a["noise"][0, :, config.top_k or k :] = -np.inf
            self.fake.denoiser.compute(a)
            a["block"] = a["next_block"].copy()
            if not a["masked_left"][0]:
                break
        return a["block"][0].tolist(), step + 1

    def token(self, text: list[int], config: GenerationConfig, index: int) -> list[int]:
        a = self.context(text) | {
            "candidate_ids": np.zeros((1, 64), np.int64),
            "candidate_logprobs": np.zeros((1, 64), np.float32),
        }
        self.fake.head.compute(a)
        sampling = Sampling.from_config(config)
        return [sampling.choose(a["candidate_ids"][0], a["candidate_logprobs"][0], index=index)]

    def generate(self, request: Request) -> tuple[list[int], str, int]:
        config, nfe, index = request.config, 0, 0
        assert config is not None
        out: list[int] = []
        text = [int(t) for t in request.prompt] or [1]
        while True:
            if config.mode == "ar":
                new, passes = self.token(text, config, index), 1
            else:
                new, passes = self.block(text, config, index)
            nfe += passes
            for t in new:
                if t == 2 and not config.ignore_eos:
                    return out, "eos", nfe
                out.append(t)
                if len(out) == config.max_new_tokens:
                    return out, "length", nfe
            text += new
            index += 1


configs = st.builds(
    options,
    mode=st.just("diffusion"),
    max_new_tokens=st.integers(1, 30),
    steps_per_block=st.integers(1, 10),
    confidence_threshold=st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 3),
    ignore_eos=st.booleans(),
) | st.builds(
    options,
    mode=st.just("ar"),
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 3),
)
requests = st.builds(
    lambda seed, n, config: Request(prompt(seed, n), config),
    st.integers(0, 99),
    st.integers(0, 40),
    configs,
)


@pytest.mark.slow
@given(
    st.lists(requests, min_size=1, max_size=8), st.integers(1, 8), st.sampled_from([1, 3, 16, 256])
)
@settings(max_examples=60)
def test_every_row_is_what_the_plain_algorithm_says(
    batch: list[Request], max_batch: int, max_chunk: int
) -> None:
    results = run(batch, max_batch=max_batch, max_chunk=max_chunk)
    naive = Naive(fake_towers(eos_every=40))
    assert [(list(r.tokens), r.finish_reason, r.usage.nfe) for r in results] == [
        naive.generate(request) for request in batch
    ]


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_row_is_the_same_alone_in_company_and_in_any_order(mode: str, temperature: float) -> None:
    one = options(mode=mode, temperature=temperature, seed=7)
    batch = [Request(prompt(i, n), one) for i, n in enumerate((1, 300, 17, 256, 257, 40, 3, 120))]
    alone = [what(run([request]))[0] for request in batch]
    assert what(run(batch)) == alone
    order = random.Random(1).sample(range(8), 8)
    assert what(run([batch[i] for i in order])) == [alone[i] for i in order]


@given(st.integers(1, 256), st.integers(1, 600))
@settings(max_examples=10)
def test_any_chunk_size_gives_the_same_text(max_chunk: int, length: int) -> None:
    request = Request(prompt(3, length), options(max_new_tokens=8))
    assert what(run([request], max_chunk=max_chunk)) == what(run([request]))


def test_temperature_zero_is_greedy_and_top_k_one_is_too() -> None:
    ways = [options(temperature=t, top_k=k) for t, k in ((0.0, 0), (1e-30, 0), (1.0, 1))]
    greedy, cold, one = run([Request(prompt(1, 9), way) for way in ways])
    assert greedy.tokens == cold.tokens == one.tokens


@pytest.mark.parametrize("most", [1, 7, 8, 9, 20])
def test_the_last_block_is_cut(most: int) -> None:
    whole = run([Request(prompt(2, 9), options(ignore_eos=True))])[0]
    cut = run([Request(prompt(2, 9), options(ignore_eos=True, max_new_tokens=most))])[0]
    assert cut.tokens == whole.tokens[:most]
    assert cut.finish_reason == "length"
    assert (cut.usage.blocks, cut.usage.completion_tokens) == (-(-most // 8), most)


def test_a_text_grows_through_the_buckets_and_stays_the_same() -> None:
    config = options(max_new_tokens=600, ignore_eos=True, confidence_threshold=0.0)
    request = Request(prompt(5, 250), config)
    fake = fake_towers()
    result = run([request], fake)[0]
    naive = Naive(fake_towers())
    text = [*request.prompt, *result.tokens[:592]]
    assert list(result.tokens[592:]) == naive.block(text, config, 74)[0]
    # 512 from the start, then 1024: one pair of bindings of each engine a bucket, and two of the
    # context engine for the prompt.
    assert (fake.context.binds, fake.denoiser.binds) == (5, 4)
    assert result.usage.nfe == fake.denoiser.runs == 75


def test_a_row_that_ends_early_does_not_keep_the_cache_growing() -> None:
    long = Request(prompt(1, 510), options(max_new_tokens=1))
    short = Request(prompt(2, 3), options(max_new_tokens=200, ignore_eos=True))
    assert what(run([long, short])) == what([*run([long]), *run([short])])


def test_nothing_is_bound_in_a_step_and_every_buffer_stays_where_it_is() -> None:
    fake = fake_towers()
    many = options(max_new_tokens=120, ignore_eos=True)
    run([Request(prompt(i, 5), many) for i in range(4)], fake)
    # the prompt's width, and the block's in both state sets
    assert (fake.context.binds, fake.denoiser.binds) == (3, 2)
    assert fake.denoiser.runs > 15
    assert len(fake.denoiser.addresses) == 2


def test_the_streams_wait_for_one_another() -> None:
    fake = fake_towers()
    two = {"max_new_tokens": 16, "steps_per_block": 2, "confidence_threshold": 1.0}
    run([Request(prompt(0, 5), options(ignore_eos=True, **two))], fake)
    assert fake.log == [
        "context stream runs context 1",
        "host waits for context 1",
        "denoiser stream waits for context 1",
        "denoiser stream runs denoiser 1",
        "host waits for denoiser 1",
        "denoiser stream runs denoiser 2",
        "host waits for denoiser 2",
        "context stream waits for denoiser 2",
        "context stream runs context 2",
        "denoiser stream waits for context 2",
        "denoiser stream runs denoiser 3",
        "host waits for denoiser 3",
        "denoiser stream runs denoiser 4",
        "host waits for denoiser 4",
        "host waits for context 2",
    ]


@pytest.mark.parametrize("queued", [True, False])
def test_the_next_step_s_noise_is_drawn_while_an_engine_works(
    monkeypatch: pytest.MonkeyPatch,
    *,
    queued: bool,
) -> None:
    """Not where it is done when it returns: that would only draw what may not be needed."""
    fake, draw = fake_towers(), StepNoise.draw

    def noted(self: StepNoise, live: Sequence[int], *, block: int, step: int) -> None:
        fake.log.append(f"draws {block}.{step}")
        draw(self, live, block=block, step=step)

    monkeypatch.setattr(StepNoise, "draw", noted)
    if not queued:
        monkeypatch.setattr(fake_engines, "FakeEvent", lambda *_: HostStream.done)
    hot = {"temperature": 1.0, "seed": 1, "ignore_eos": True, "confidence_threshold": 1.0}
    run([Request(prompt(0, 5), options(max_new_tokens=16, steps_per_block=2, **hot))], fake)
    told = [line for line in fake.log if "draw" in line or "denoiser" in line]
    told = [line for line in told if "stream waits" not in line]
    waits = ["host waits for denoiser 1"] if queued else []
    ahead = ["draws 0.0", "denoiser stream runs denoiser 1", "draws 0.1", *waits]
    at_once = ["draws 0.0", "denoiser stream runs denoiser 1", *waits, "draws 0.1"]
    assert told[: len(ahead)] == (ahead if queued else at_once)
    every = [f"draws {block}.{step}" for block in (0, 1) for step in (0, 1)]
    assert [line for line in told if "draws" in line] == every
    between = ["context stream runs context 2", "draws 1.0", "denoiser stream runs denoiser 3"]
    assert [line for line in fake.log if line in between] == between


def test_a_block_nobody_goes_on_from_is_not_read_back() -> None:
    for mode in ("diffusion", "ar"):
        fake = fake_towers()
        run([Request(prompt(0, 5), options(max_new_tokens=1, mode=mode))], fake)
        assert fake.context.runs == 1


def test_every_step_can_be_watched() -> None:
    seen: list[StepRecord] = []
    fake = fake_towers()
    with TwoTower.from_towers(fake.towers) as model:
        careful = options(ignore_eos=True, confidence_threshold=1.0)
        both = [Request(prompt(0, 5), options(max_new_tokens=8)), Request(prompt(1, 9), careful)]
        short, long = model.generate(both, on_step=seen.append)
    assert [(r.block_index, r.step) for r in seen] == [(b, s) for b in range(3) for s in range(8)]
    assert sum(0 in r.rows for r in seen) == short.usage.nfe
    assert all(r.ms > 0 for r in seen)
    assert sum(r.ms for r in seen) <= long.timings.denoise
    assert sum(1 in r.rows for r in seen) == long.usage.nfe == 24
    for before, after in pairwise(seen):
        if after.step:
            assert np.array_equal(before.next_block, after.block_in), "records are copies"
    masked = (seen[3].block_in == 3).mean(1)
    assert np.array_equal(seen[3].t, masked.astype(np.float32))
    assert [t for r in seen if r.step == 7 for t in r.next_block[1]] == list(long.tokens)


def test_progress_of_the_prompt() -> None:
    seen: list[tuple[int, int]] = []
    fake = fake_towers()
    with TwoTower.from_towers(fake.towers, max_chunk=4) as model:
        prompts = [prompt(0, 10), prompt(1, 3)]
        model.generate(prompts, options(max_new_tokens=1), on_prefill=lambda *at: seen.append(at))
    assert seen == [(4, 13), (8, 13), (13, 13)]


def test_padding_is_the_pad_token_and_greedy_rows_have_no_noise() -> None:
    fake = fake_towers(fake_config(pad_token_id=9))
    chunks: list[np.ndarray] = []
    noises: list[np.ndarray] = []
    read, denoise = fake.context.compute, fake.denoiser.compute

    def reading(arrays: Any) -> None:
        chunks.append(arrays[TOKENS].copy())
        read(arrays)

    def denoising(arrays: Any) -> None:
        noises.append(arrays["noise"].copy())
        denoise(arrays)

    fake.context.compute, fake.denoiser.compute = reading, denoising
    with TwoTower.from_towers(fake.towers, max_chunk=4) as model:
        hot = options(max_new_tokens=8, temperature=1.0)
        model.generate([[5, 6, 7, 8, 9, 10], [11, 12, 13]], hot)
        assert chunks[0].tolist() == [[5, 6, 7, 8], [9, 9, 9, 9]]
        assert chunks[1].tolist() == [[9, 10, 9], [11, 12, 13]]
        assert noises[0].all()
        noises.clear()
        model.generate([[5], [6]], options(max_new_tokens=8))
        assert not any(n.any() for n in noises), "buffers are reused, their noise is not"


def test_mask_zero_does_not_confuse_ended_rows() -> None:
    config = fake_config(mask_token_id=0)
    batch = [
        Request(prompt(0, 5), options(max_new_tokens=1)),
        Request(prompt(1, 9), options(ignore_eos=True)),
    ]
    alone = [what(run([request], fake_towers(config)))[0] for request in batch]
    assert what(run(batch, fake_towers(config))) == alone
