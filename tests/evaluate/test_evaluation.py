"""Evaluation and tuning against a model whose every figure is known beforehand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_model import AR_MS, EXTEND_MS, PASS_MS, FakeModel, difficulty, problem
from twotower.config import GenerationConfig
from twotower.errors import BudgetError, ConfigError
from twotower.evaluate.evaluation import (
    AR,
    DEFAULT,
    OTHER,
    EvaluationConfig,
    evaluate,
    setting_name,
)
from twotower.evaluate.evaluation_page import report_page, where_it_loses
from twotower.evaluate.resampling import Resampler
from twotower.evaluate.suite import Suite
from twotower.evaluate.tune import TuneConfig, tune

PROBLEMS = tuple(
    problem(kind, i, "out" if i % 10 == 9 else "in")
    for kind in ("sums", "words")
    for i in range(60)
)
SUITE = Suite("s", "0" * 64, PROBLEMS)
CONFIG = EvaluationConfig(thresholds=(0.5, 0.9), steps=(2, 16), budget=98.7)


def evaluated(**changes: Any) -> tuple[FakeModel, dict[str, Any]]:
    other = changes.pop("other", None)
    model = FakeModel(PROBLEMS, **changes)
    return model, evaluate(model, SUITE, CONFIG, other=other)  # type: ignore[arg-type]


def test_every_figure_is_the_one_the_model_produced() -> None:
    _, report = evaluated(defaults=GenerationConfig(confidence_threshold=0.9))
    right = sum(difficulty(p) <= 0.9 for p in PROBLEMS)
    total = report["settings"][DEFAULT]["total"]
    counts = [total[key] for key in ("problems", "right", "lost", "won")]
    assert counts == [120, right, 120 - right, 0]
    assert total["retention"]["value"] == pytest.approx(100 * right / 120, abs=1e-4)
    assert total["passes_per_block"] == 10
    assert total["tokens_per_pass"] == 1
    ms = 2 * (10 * PASS_MS + EXTEND_MS)
    assert total["tokens_per_second"] == pytest.approx(1000 * 20 / ms, abs=0.01)
    assert total["speedup"]["value"] == pytest.approx(20 * AR_MS / ms, abs=1e-4)
    ar = report["settings"][AR]["total"]
    assert (ar["right"], ar["passes_per_block"]) == (120, None)
    assert (ar["retention"]["value"], ar["speedup"]["value"]) == (100, 1)
    assert set(report["settings"]) == {AR, DEFAULT, "0.5/2", "0.9/2", "0.5/16", "0.9/16"}
    assert report["settings"][DEFAULT]["kinds"]["sums"]["problems"] == 60
    assert report["settings"][DEFAULT]["lengths"]["out"]["problems"] == 12
    assert report["likelihood"]["nats_per_token"] == pytest.approx(0.375)
    kept = {"setting": DEFAULT, "retention": total["retention"]["value"], "met": False}
    assert report["budget"] == {"percent": 98.7, **kept}
    json.dumps(report, allow_nan=False)


def test_all_settings_answer_every_problem_in_turn() -> None:
    model, _ = evaluated()
    counted = model.calls[2 * 6 :]  # after the warm-up
    turns = [counted[6 * i : 6 * i + 6] for i in range(len(PROBLEMS))]
    for turn, asked in zip(turns, PROBLEMS, strict=True):
        assert {c[0] for c in turn} == {asked.prompt}
        assert len({c[1:] for c in turn}) == 5  # the default preset is one of the sweep here
    assert len({tuple(c[1:] for c in turn) for turn in turns[:6]}) > 1, "the order changes"


def test_what_is_sampled_is_sampled_alike_in_every_run_and_the_report_says_how() -> None:
    for seed, used in ((None, 0), (7, 7)):
        hot = GenerationConfig(temperature=1.0, seed=seed)
        model, report = evaluated(defaults=hot, other=FakeModel(PROBLEMS, defaults=hot))
        assert {s["config"]["seed"] for s in report["settings"].values()} == {used}
        assert set(model.seeds) == {used}


def test_where_diffusion_loses_is_said() -> None:
    _, report = evaluated(defaults=GenerationConfig(confidence_threshold=0.9))
    assert [kind.split()[0] for kind in where_it_loses(report)] == ["sums", "words"]
    assert "runs at 0.48x" in where_it_loses(report)[0]
    fast = GenerationConfig(confidence_threshold=0.9, steps_per_block=2)
    _, report = evaluated(defaults=fast, wrong_below=1.0)
    assert where_it_loses(report) == []


def test_a_second_bundle_is_measured_against_the_first() -> None:
    model, other = FakeModel(PROBLEMS, wrong_below=1.0), FakeModel(PROBLEMS, wrong_below=-0.4)
    report = evaluate(model, SUITE, CONFIG, other=other)  # type: ignore[arg-type]
    kept = report["settings"][OTHER]["total"]["retention"]["value"]
    assert kept == pytest.approx(100 * sum(difficulty(p) <= 0.5 for p in PROBLEMS) / 120, abs=1e-4)
    assert report["other_to_default"]["total"]["retention"]["value"] == kept
    assert report["budget"]["setting"] == OTHER
    assert not report["budget"]["met"]


@pytest.mark.slow
def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """95 % of the intervals hold the known rate; 400 samples count that within 2.5 points."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(400):
        right = rng.random(200) < 0.8
        resampler = Resampler(200, draws=400, seed=seed)
        interval = resampler.interval(lambda a, b: a / b, right, np.ones(200))
        hits += interval["low"] <= 0.8 <= interval["high"]
    assert 0.92 <= hits / 400 <= 0.975


def test_intervals_need_a_denominator_and_are_the_same_for_the_same_answers() -> None:
    interval = Resampler(5).interval(lambda a, b: a / b, np.ones(5), np.zeros(5))
    assert interval == {"value": None, "low": None, "high": None}
    right = np.arange(50) % 3 > 0
    one, two = (Resampler(50).interval(lambda a, b: a / b, right, np.ones(50)) for _ in range(2))
    assert one == two
    assert one["low"] < one["value"] < one["high"]


def test_tuning_finds_the_fastest_inside_the_budget_and_checks_it_elsewhere() -> None:
    thresholds = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    model = FakeModel(PROBLEMS, wrong_below=0.2)
    config = TuneConfig(budget=95, loose=30, thresholds=thresholds, steps=(4, 16))
    tuned = tune(model, SUITE, config)  # type: ignore[arg-type]
    first, second = SUITE.halves()

    def kept(problems: tuple[Any, ...], threshold: float) -> float:
        return 100 * sum(difficulty(p) <= threshold + 0.2 for p in problems) / len(problems)

    def lowest(budget: float) -> float:
        """The lowest threshold that keeps it, as all above it do."""
        wrong = [t for t in thresholds if kept(first.problems, t) < budget]
        return min(t for t in thresholds if t > max(wrong, default=0))

    balanced = tuned.presets["balanced"]
    assert (balanced.confidence_threshold, balanced.steps_per_block) == (lowest(95), 4)
    checked = tuned.report["presets"]["balanced"]["check"]["retention"]["value"]
    assert checked == pytest.approx(kept(second.problems, lowest(95)), abs=1e-4)
    assert tuned.holds is (checked >= 95)
    assert tuned.presets["fast"].confidence_threshold == lowest(65) < lowest(95)
    most = max(kept(first.problems, t) for t in thresholds)
    assert kept(first.problems, tuned.presets["quality"].confidence_threshold) == most
    assert {p.max_new_tokens for p in tuned.presets.values()} == {GenerationConfig().max_new_tokens}


@pytest.mark.parametrize("seed", [None, 3])
def test_presets_keep_no_seed_that_was_not_given(seed: int | None) -> None:
    model = FakeModel(PROBLEMS, defaults=GenerationConfig(temperature=1.0, seed=seed))
    grid = TuneConfig(budget=1, thresholds=(0.9,), steps=(16,))
    tuned = tune(model, SUITE, grid)  # type: ignore[arg-type]
    assert {p.seed for p in tuned.presets.values()} == {seed}
    assert set(model.seeds) == {seed or 0}


def test_a_lucky_setting_between_two_that_fail_is_not_chosen() -> None:
    class Lucky(FakeModel):
        def generate(self, prompt: str, config: GenerationConfig) -> Any:
            lucky = config.confidence_threshold == 0.5
            self.wrong_below = 1.0 if lucky else -0.3
            return super().generate(prompt, config)

    with pytest.raises(BudgetError) as caught:
        tune(Lucky(PROBLEMS), SUITE, TuneConfig(budget=99, thresholds=(0.3, 0.5, 0.9), steps=(16,)))  # type: ignore[arg-type]
    assert "threshold 0.5" in caught.value.found


def test_a_budget_out_of_reach_names_the_best() -> None:
    model = FakeModel(PROBLEMS, wrong_below=-0.5)
    with pytest.raises(BudgetError) as caught:
        tune(model, SUITE, TuneConfig(thresholds=(0.5, 0.9), steps=(16,)))  # type: ignore[arg-type]
    assert f"the best of 2 is threshold {0.9:g} with 16 steps" in caught.value.found
    for wrong in (0, 101):
        with pytest.raises(ConfigError):
            TuneConfig(budget=wrong)


def test_the_page_holds_every_setting_and_no_markup_of_its_content() -> None:
    hostile = tuple(problem("<script>alert(1)</script>", i) for i in range(4))
    model = FakeModel(hostile, wrong_below=-1.0)
    report = evaluate(model, Suite("s", "0" * 64, hostile), CONFIG)  # type: ignore[arg-type]
    report["bundle"] = {"name": "b<b>", "target": "fake"}
    page = report_page(report, "<svg></svg>", model="m")
    assert "<script>alert" not in page
    assert "b&lt;b&gt;" in page
    for threshold in CONFIG.thresholds:
        for steps in CONFIG.steps:
            assert setting_name(threshold, steps) in report["settings"]
    assert page.count("<details>") == 4
