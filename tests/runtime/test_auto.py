"""Mode `auto`: the decision by figures, and in a session with given pass times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_engines import FakeTowers
from twotower.config import GenerationConfig
from twotower.runtime import Generation, Request, TwoTower
from twotower.runtime.auto import (
    PassesSeen,
    PassRecord,
    PassTimes,
    Setting,
    break_even,
    choose,
    times_for,
)
from twotower.runtime.pass_times import FIRST, RUNS

AUTO = GenerationConfig(mode="auto", max_new_tokens=40, ignore_eos=True)
SETTING = Setting(0.9, 16, 16)
EVEN_AT_FIVE = PassTimes(denoise_ms=3.0, extend_ms=1.0, step_ms=1.0)
FAST_STEPS = PassTimes(denoise_ms=100.0, extend_ms=1.0, step_ms=1.0)
SLOW_STEPS = PassTimes(denoise_ms=1.0, extend_ms=1.0, step_ms=100.0)


def replace_times(model: TwoTower, times: dict[int, PassTimes], **known: Any) -> None:
    model._auto.start_from(PassRecord({}, {16: times}, **known))


def batch(model: TwoTower, rows: int, config: GenerationConfig = AUTO) -> list[Generation]:
    return model.generate([[5 + i, 9] for i in range(rows)], config)


# The decision


@given(
    denoise=st.floats(0.1, 100),
    extend=st.floats(0.1, 100),
    step=st.floats(0.1, 100),
    passes=st.floats(1, 16),
)
def test_the_mode_of_less_time_is_chosen(
    denoise: float, extend: float, step: float, passes: float
) -> None:
    times = PassTimes(denoise_ms=denoise, extend_ms=extend, step_ms=step)
    spent = {"diffusion": passes * denoise + extend, "ar": 16 * step}
    chosen = choose(times, SETTING, passes, tokens=16)
    assert chosen is not None
    assert spent[chosen] <= min(spent.values()) * (1 + 1e-9)
    assert choose(times, SETTING, None, tokens=16) in (chosen, None)


def test_steps_bound_the_passes() -> None:
    for steps in (2, 4, 5, 6, 16):
        want = "diffusion" if steps <= 5 else None
        assert choose(EVEN_AT_FIVE, Setting(0.9, steps, 16), None, tokens=16) == want
    assert choose(EVEN_AT_FIVE, Setting(0.9, 99, 4), None, tokens=16) == "diffusion"
    assert choose(EVEN_AT_FIVE, SETTING, 5.0, tokens=16) == "diffusion"
    assert choose(EVEN_AT_FIVE, SETTING, 5.1, tokens=16) == "ar"


def test_a_text_shorter_than_a_block_needs_fewer_steps() -> None:
    assert break_even(EVEN_AT_FIVE, 16) == 5
    assert choose(EVEN_AT_FIVE, SETTING, 2.0, tokens=16) == "diffusion"
    assert choose(EVEN_AT_FIVE, SETTING, 2.0, tokens=6) == "ar"


def test_times_lie_between_those_of_measured_rows() -> None:
    one, three = EVEN_AT_FIVE, PassTimes(denoise_ms=7.0, extend_ms=2.0, step_ms=5.0)
    table = {1: one, 3: three}
    assert times_for(table, 2) == PassTimes(denoise_ms=5.0, extend_ms=1.5, step_ms=3.0)
    assert [times_for(table, n) for n in (1, 3, 4)] == [one, three, three]
    assert times_for({2: three}, 1) == three


def test_the_mean_is_of_a_setting_and_follows_the_texts() -> None:
    seen = PassesSeen()
    assert seen.expected(SETTING, 1) is None
    seen.note(SETTING, 1, passes=30, blocks=10)
    seen.note(SETTING, 1, passes=50, blocks=10)
    seen.note(SETTING, 8, passes=9, blocks=1)
    assert [seen.expected(SETTING, n) for n in (1, 3, 8)] == [4, 4, 9]
    assert seen.expected(Setting(0.8, 16, 16), 1) is None
    for _ in range(40):
        seen.note(SETTING, 1, passes=100, blocks=10)
    assert seen.expected(SETTING, 1) == pytest.approx(10, rel=0.05)
    seen.note(SETTING, 1, passes=0, blocks=0)
    assert seen.expected(SETTING, 1) == pytest.approx(10, rel=0.05)


# In a session


def test_replaced_times_flip_the_mode_and_texts_are_the_modes_own(model: TwoTower) -> None:
    for times, mode in ((FAST_STEPS, "ar"), (SLOW_STEPS, "diffusion"), (FAST_STEPS, "ar")):
        replace_times(model, {1: times})
        result = batch(model, 3)
        want = batch(model, 3, replace(AUTO, mode=mode))
        assert {r.mode for r in result} == {mode}
        assert [(r.tokens, r.usage) for r in result] == [(r.tokens, r.usage) for r in want]
        assert result[0].to_json()["mode"] == mode


def test_rows_change_the_mode(model: TwoTower) -> None:
    replace_times(model, {1: SLOW_STEPS, 8: FAST_STEPS})
    assert {r.mode for r in batch(model, 1)} == {"diffusion"}
    assert {r.mode for r in batch(model, 8)} == {"ar"}
    # Of nine requests the last runs alone.
    assert [r.mode for r in batch(model, 9)] == ["ar"] * 8 + ["diffusion"]


def test_steps_two_and_four_change_the_mode(model: TwoTower) -> None:
    even_at_three = PassTimes(denoise_ms=5.0, extend_ms=1.0, step_ms=1.0)
    two, four = (replace(AUTO, steps_per_block=n, confidence_threshold=1.0) for n in (2, 4))
    for _ in range(2):  # before and after the passes of four steps are known
        replace_times(model, {1: even_at_three})
        mixed = model.generate([Request([5], two), Request([6], four), Request([7], two)])
        assert [r.mode for r in mixed] == ["diffusion", "ar", "diffusion"]


def test_an_unknown_setting_is_decided_by_a_first_block(model: TwoTower, fake: FakeTowers) -> None:
    passes = batch(model, 1, replace(AUTO, mode="diffusion", confidence_threshold=1.0))[0].usage
    assert passes.steps_per_block == 16
    slow = replace(AUTO, confidence_threshold=1.0)
    replace_times(model, {1: EVEN_AT_FIVE})
    fake.denoiser.runs = 0
    want = batch(model, 1, replace(slow, mode="ar"))
    for _ in range(2):
        (result,) = batch(model, 1, slow)
        assert (result.mode, result.tokens) == ("ar", want[0].tokens)
        assert fake.denoiser.runs == 16, "one block, and only at first"
    other = replace(slow, confidence_threshold=0.99)
    events = model.stream([[5, 9]], other)
    next(events)
    assert len(model._workspaces._working) == 1, "the dropped block's buffers are given back"
    events.close()
    quick = replace(AUTO, confidence_threshold=0.0)
    streamed = [e for e in model.stream([[5, 9]], quick) if e.row == 0]
    want = batch(model, 1, replace(quick, mode="diffusion"))
    assert [t for e in streamed for t in e.tokens] == list(want[0].tokens)
    assert streamed[-1].result is not None
    assert streamed[-1].result.mode == "diffusion"


def test_passes_of_a_record_need_no_first_block(model: TwoTower, fake: FakeTowers) -> None:
    replace_times(model, {1: EVEN_AT_FIVE}, passes={SETTING: (9.0, 10)})
    assert batch(model, 1)[0].mode == "ar"
    assert fake.denoiser.runs == 0


def test_passes_are_those_of_the_whole_batch(model: TwoTower) -> None:
    """A batch goes on until its slowest row is done: its passes are no mean of the rows'."""
    replace_times(model, {1: SLOW_STEPS})
    runs: list[int] = []
    config = replace(AUTO, confidence_threshold=0.5)
    model.generate([[5 + i] for i in range(8)], config, on_step=lambda s: runs.append(s.step))
    setting = Setting(0.5, 16, 16)
    assert model._auto._seen.expected(setting, 8) == len(runs) / 3


def test_first_use_measures_three_passes_of_each(model: TwoTower, fake: FakeTowers) -> None:
    config = replace(AUTO, steps_per_block=1, max_new_tokens=16)
    want = batch(model, 2, replace(config, mode="diffusion"))
    before = fake.denoiser.runs, fake.context.runs, fake.head.runs
    for _ in range(2):
        times = model._auto.times(2, 16)
        after = fake.denoiser.runs, fake.context.runs, fake.head.runs
        ran = [b - a for a, b in zip(before, after, strict=True)]
        assert ran == [n * (FIRST + RUNS) for n in (1, 2, 1)], "three, and two that do not count"
        assert min(times.denoise_ms, times.extend_ms, times.step_ms) > 0
    assert RUNS == 3
    again = batch(model, 2, replace(config, mode="diffusion"))
    assert [r.tokens for r in again] == [r.tokens for r in want], "scratch leaves nothing behind"
    (result,) = batch(model, 1, config)
    alone = batch(model, 1, replace(config, mode=result.mode))
    assert result.tokens == alone[0].tokens


def test_blocks_of_many_tokens_fit_a_short_session(fake: FakeTowers) -> None:
    with TwoTower.from_towers(fake.towers, max_context=10) as session:
        config = replace(AUTO, block_size=256, max_new_tokens=5, allow_untrained_block_size=True)
        assert len(session.generate([5], config).tokens) == 5
