"""The session: what it accepts and refuses, streaming, failures, threads, and closing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_engines import FakeTowers, fake_config, fake_towers
from twotower.config import GenerationConfig
from twotower.errors import ConfigError, EngineOutputError, RequestError
from twotower.runtime import BlockEvent, Generation, Request, RequestCancelledError, TwoTower
from twotower.runtime.tokenizer import Tokenizer

SHORT = GenerationConfig(max_new_tokens=40, ignore_eos=True)


@pytest.fixture
def speaking(tokenizer: Tokenizer) -> Iterator[TwoTower]:
    """A session with a tokenizer."""
    with TwoTower.from_towers(
        fake_towers(fake_config(vocab_size=260)).towers, tokenizer=tokenizer
    ) as session:
        yield session


def tokens_of(events: list[BlockEvent], row: int) -> list[int]:
    return [t for e in events if e.row == row for t in e.tokens]


# What may be asked for


def test_one_prompt_gives_one_result_and_a_list_a_list(model: TwoTower) -> None:
    one = model.generate([5, 6, 7], SHORT)
    assert isinstance(one, Generation)
    for same in ((5, 6, 7), np.array([5, 6, 7]), Request([5, 6, 7])):
        again = model.generate(same, SHORT)  # type: ignore[arg-type]
        assert again.tokens == one.tokens
    several = model.generate([[5, 6, 7], [8]], SHORT)
    assert several[0].tokens == one.tokens
    assert len(several) == 2
    assert model.generate([], SHORT) == []  # type: ignore[comparison-overlap]
    assert model.generate([5, 3, 6], SHORT).usage.completion_tokens == 40, "with a mask token"


def test_an_empty_prompt_is_the_bos_token(model: TwoTower, speaking: TwoTower) -> None:
    assert model.generate([[]], SHORT)[0].tokens == model.generate([1], SHORT).tokens
    assert speaking.generate("", SHORT).tokens == speaking.generate([1], SHORT).tokens


def test_requests_bring_their_own_options_in_any_mix(model: TwoTower) -> None:
    wishes = [
        GenerationConfig(max_new_tokens=20, mode="ar"),
        GenerationConfig(max_new_tokens=33, ignore_eos=True),
        GenerationConfig(max_new_tokens=9, block_size=4, confidence_threshold=0.3),
        GenerationConfig(max_new_tokens=20, temperature=1.0, seed=8, steps_per_block=3),
        GenerationConfig(mode="ar", max_new_tokens=5, temperature=1.0, top_p=0.9, seed=1),
    ]
    batch = [Request([5 + i], wish) for i, wish in enumerate(wishes)]
    for together, alone in zip(model.generate(batch), map(model.generate, batch), strict=True):
        assert (together.tokens, together.usage) == (alone.tokens, alone.usage)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_missing_seed_is_drawn_for_each_request_and_told(model: TwoTower, mode: str) -> None:
    hot = replace(SHORT, mode=mode, temperature=3.0)
    results = model.generate([[5, 6, 7]] * 4, hot)
    streamed = [e.result for e in model.stream([[5, 6, 7]] * 2, hot) if e.result is not None]
    drawn = [r.seed for r in (*results, *streamed)]
    assert len({r.tokens for r in results}) == 4
    assert len(set(drawn)) == 6
    for result in results:
        assert result.seed is not None
        again = replace(hot, seed=result.seed)
        batch = [Request([9], SHORT), Request([5, 6, 7], again), Request([5], again)]
        assert model.generate([5, 6, 7], again).tokens == result.tokens
        assert model.generate(batch)[1].tokens == result.tokens


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_given_seed_is_every_prompts_and_greedy_has_none(model: TwoTower, mode: str) -> None:
    hot = replace(SHORT, mode=mode, temperature=3.0, seed=11)
    results = model.generate([[5, 6, 7], [5, 6, 7], [8]], hot)
    assert [r.seed for r in results] == [11] * 3
    assert results[0].tokens == results[1].tokens
    for seed in (None, 11):
        assert model.generate([5, 6, 7], replace(SHORT, mode=mode, seed=seed)).seed is None


def test_the_sessions_defaults_are_used() -> None:
    short = replace(SHORT, max_new_tokens=3)
    with TwoTower.from_towers(fake_towers().towers, defaults=short) as session:
        assert session.generate([5]).usage.completion_tokens == 3
        assert session.defaults.max_new_tokens == 3


TOO_LONG = "100 tokens, and 401 new ones.*\n.*500 tokens a text.*\n.*to 400 or less.*max_context"


@pytest.mark.parametrize(
    ("prompt", "config", "says"),
    [
        ([5, 97], {}, "97 at position 1; allowed: 0 to 96"),
        ([-1], {}, "-1 at position 0"),
        ([5, "6"], {}, "a str among token ids"),
        ([5, 6.0], {}, "a float among token ids"),
        (5, {}, "a int is not a prompt"),
        ([[5], 6], {}, "a int is not a prompt"),
        ("text", {}, "--tokens"),
        ([5], {"stop": "x"}, "a stop string"),
        ([5] * 100, {"max_new_tokens": 401}, TOO_LONG),
        ([5] * 600, {}, "shorten the prompt"),
        ([5], {"block_size": 64, "max_new_tokens": 64}, "(?s)64.*trained.*76.4 to 19.9"),
        ([5], {"block_size": 257, "allow_untrained_block_size": True}, "256"),
    ],
)
def test_what_cannot_be_served_is_refused_before_any_work(
    fake: FakeTowers, prompt: Any, config: dict[str, Any], says: str
) -> None:
    kind = ConfigError if "block_size" in config else RequestError
    bad: Any = [Request([5]), prompt] if isinstance(prompt, int) else prompt
    with TwoTower.from_towers(fake.towers, max_context=500) as session:
        for call in (session.generate, session.stream):
            with pytest.raises(kind, match=says):
                call(bad, GenerationConfig(**config))
        assert fake.log == []


def test_the_longest_text_that_fits_is_served() -> None:
    with TwoTower.from_towers(fake_towers().towers, max_context=300) as session:
        for mode in ("diffusion", "ar"):
            options = GenerationConfig(max_new_tokens=30, ignore_eos=True, mode=mode)
            several = session.generate([[5] * 270, [6]], options)
            assert several[0].tokens == session.generate([5] * 270, options).tokens


def test_a_larger_block_needs_the_override(model: TwoTower) -> None:
    config = replace(SHORT, block_size=40, allow_untrained_block_size=True)
    assert model.generate([5], config).usage.blocks == 1
    ar = GenerationConfig(mode="ar", block_size=99, max_new_tokens=3)
    assert model.generate([5], ar).usage.blocks == 0


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"max_context": 0}, {"max_context": 4097}, {"max_chunk": 257}]
)
def test_session_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.* cannot be used"):
        TwoTower.from_towers(fake_towers().towers, **wrong)


# Text


def test_text_comes_with_a_tokenizer(
    speaking: TwoTower, model: TwoTower, tokenizer: Tokenizer
) -> None:
    result = speaking.generate("hello", SHORT)
    assert result.text == tokenizer.decode(result.tokens)
    assert result.usage.prompt_tokens == 6
    data = result.to_json()
    assert list(data) == ["tokens", "text", "finish_reason", "mode", "seed", "usage", "timings_ms"]
    usage = "prompt_tokens completion_tokens nfe blocks steps_per_block tokens_per_nfe"
    assert list(data["usage"]) == usage.split()
    assert list(data["timings_ms"]) == ["prefill", "denoise", "extend", "total"]
    assert "text" not in model.generate([5], SHORT).to_json()


def test_a_stop_string_across_blocks_ends_its_row_only(
    speaking: TwoTower, tokenizer: Tokenizer
) -> None:
    free = speaking.generate(["twelve", "two"], SHORT)
    stop = tokenizer.decode(free[0].tokens[14:18])
    assert stop.isascii() and len(stop) == 4, "two characters on each side of the block's end at 16"
    own = replace(SHORT, stop=(stop,))
    stopped, other = speaking.generate([Request("twelve", own), Request("two")], SHORT)
    assert (stopped.finish_reason, stopped.tokens) == ("stop", free[0].tokens[:18])
    assert stopped.text == tokenizer.decode(free[0].tokens[:14])
    assert other.tokens == free[1].tokens
    shown = [event.text for event in speaking.stream("twelve", own)]
    assert "".join(text or "" for text in shown) == stopped.text, "its beginning is held back"


def test_eos_ends_its_row_only() -> None:
    with TwoTower.from_towers(fake_towers(eos_every=60).towers) as session:
        prompts = [[5 + i, 9] for i in range(8)]
        many = session.generate(prompts, GenerationConfig(max_new_tokens=64))
        assert {r.finish_reason for r in many} == {"eos", "length"}
        free = session.generate(prompts, GenerationConfig(max_new_tokens=64, ignore_eos=True))
        for ended, whole in zip(many, free, strict=True):
            assert 2 not in ended.tokens
            assert ended.tokens == whole.tokens[: len(ended.tokens)]
            assert ended.finish_reason == "length" or whole.tokens[len(ended.tokens)] == 2


# Streaming


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_streaming_adds_up_to_the_result(speaking: TwoTower, mode: str) -> None:
    config = GenerationConfig(max_new_tokens=40, mode=mode, stop=("\n",))
    results = speaking.generate(["one", "three", "seven"], config)
    events = list(speaking.stream(["one", "three", "seven"], config))
    for row, result in enumerate(results):
        mine = [e for e in events if e.row == row]
        assert tuple(tokens_of(events, row)) == result.tokens
        assert "".join(e.text or "" for e in mine) == result.text
        assert [e.finished for e in mine] == [False] * (len(mine) - 1) + [True]
        assert [e.result is not None for e in mine] == [e.finished for e in mine]
        last: Any = mine[-1].result
        assert (last.tokens, last.text, last.usage) == (result.tokens, result.text, result.usage)


def test_blocks_come_as_they_are_committed(model: TwoTower, fake: FakeTowers) -> None:
    stream = model.stream([5, 6], SHORT)
    assert fake.denoiser.runs == 0, "nothing is done before the first event is asked for"
    first = next(stream)
    assert (len(first.tokens), first.finished) == (16, False)
    passes = fake.denoiser.runs
    stream.close()
    assert 0 < passes <= 16
    assert fake.denoiser.runs == passes


def test_streams_and_calls_take_turns_without_disturbing_one_another(model: TwoTower) -> None:
    alone = [model.generate([p], SHORT).tokens for p in (5, 6, 7)]
    first, second = model.stream([5], SHORT), model.stream([6], SHORT)
    mixed: list[list[int]] = [[], []]
    for a, b in zip(first, second, strict=True):
        mixed[0] += a.tokens
        mixed[1] += b.tokens
        assert model.generate([7], SHORT).tokens == alone[2]
    assert [tuple(m) for m in mixed] == alone[:2]


# Failures


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("at", [1, 2])
def test_nan_is_an_error_and_poisons_nothing(
    model: TwoTower, fake: FakeTowers, mode: str, at: int
) -> None:
    config = GenerationConfig(max_new_tokens=40, ignore_eos=True, mode=mode)
    good = model.generate([5, 6], config).tokens
    fake.context.nan_at = fake.context.runs + at
    with pytest.raises(EngineOutputError, match=r"row 0, (block|token) \d"):
        model.generate([[5, 6], [7]], config)
    assert model.generate([5, 6], config).tokens == good


def test_nan_of_the_denoiser_names_its_place(model: TwoTower, fake: FakeTowers) -> None:
    fake.denoiser.nan_at = 3
    says = r"the denoiser .*row 0, block 0, step 2\)\n  found: confidence is nan at position 0"
    with pytest.raises(EngineOutputError, match=says):
        model.generate([5], GenerationConfig(confidence_threshold=1.0))


def test_a_denoiser_that_never_finishes_is_an_error_and_not_a_hang(
    model: TwoTower, fake: FakeTowers
) -> None:
    honest = fake.denoiser.compute

    def stubborn(arrays: Any) -> None:
        honest(arrays)
        arrays["next_block"][...] = arrays["block"]
        arrays["masked_left"][...] = 16

    fake.denoiser.compute = stubborn
    with pytest.raises(EngineOutputError, match="holds 3 at position 0 after the last step"):
        model.generate([5], SHORT)
    assert fake.denoiser.runs == 16


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_tokens_outside_the_vocabulary_are_caught(
    model: TwoTower, fake: FakeTowers, mode: str
) -> None:
    engine, name = (
        (fake.denoiser, "next_block") if mode == "diffusion" else (fake.head, "candidate_ids")
    )
    honest = engine.compute

    def wild(arrays: Any) -> None:
        honest(arrays)
        arrays[name][0, 1] = 10**12

    engine.compute = wild
    with pytest.raises(EngineOutputError, match="1000000000000"):
        model.generate([5], GenerationConfig(mode=mode, steps_per_block=1))


@pytest.mark.parametrize("engine", ["context", "denoiser"])
def test_a_failed_run_surfaces_and_the_session_goes_on(
    model: TwoTower, fake: FakeTowers, engine: str
) -> None:
    good = model.generate([5], SHORT).tokens
    broken = getattr(fake, engine)
    broken.fail_at = broken.runs + 2
    with pytest.raises(RuntimeError, match="fell off the bus"):
        list(model.stream([5], SHORT))
    assert model.generate([5], SHORT).tokens == good


def test_cancelling_stops_between_passes_and_leaves_the_session_usable(
    model: TwoTower, fake: FakeTowers
) -> None:
    good = model.generate([5], SHORT).tokens
    for passes in (0, 5):  # in the prompt, and in a block
        most = fake.denoiser.runs + passes
        with pytest.raises(RequestCancelledError):
            model.generate([5], SHORT, cancelled=lambda most=most: fake.denoiser.runs >= most)  # type: ignore[misc]
        assert fake.denoiser.runs == most
    assert model.generate([5], SHORT).tokens == good


def test_buffers_are_reused_by_requests_of_the_same_size(model: TwoTower, fake: FakeTowers) -> None:
    model.generate([5, 6], SHORT)
    binds = fake.context.binds, fake.denoiser.binds
    results = [model.generate([5, 6], SHORT).tokens for _ in range(3)]
    assert (fake.context.binds, fake.denoiser.binds) == binds
    assert len(set(results)) == 1


# Threads and the end


def test_threads_queue(model: TwoTower, fake: FakeTowers) -> None:
    alone = {p: model.generate([p], SHORT).tokens for p in range(5, 11)}
    found: dict[int, tuple[int, ...]] = {}
    busy = threading.Lock()
    honest = fake.denoiser.compute

    def alone_in_here(arrays: Any) -> None:
        assert busy.acquire(blocking=False), "two threads are in the engines at once"
        time.sleep(0.0005)  # lets another thread come in, if anything would
        honest(arrays)
        busy.release()

    fake.denoiser.compute = alone_in_here

    def work(p: int) -> None:
        if p % 2:
            found[p] = model.generate([p], SHORT).tokens
        else:
            found[p] = tuple(t for e in model.stream([p], SHORT) for t in e.tokens)

    threads = [threading.Thread(target=work, args=(p,)) for p in alone]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert found == alone


def test_closing_frees_once_and_a_closed_session_says_so(fake: FakeTowers) -> None:
    session = TwoTower.from_towers(fake.towers)
    stream = session.stream([5], SHORT)
    next(stream)
    session.close()
    session.close()
    assert [e.closed for e in (fake.context, fake.head, fake.denoiser)] == [1, 1, 1]
    for call in (
        lambda: session.generate([5]),
        lambda: session.stream([5]),
        session.__enter__,
        lambda: next(stream),
    ):
        with pytest.raises(RequestError, match="this session is closed"):
            call()
