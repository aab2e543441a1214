"""The impact of quantization: known ratios, variants, the page, and the choice of formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.quantized import quantized
from twotower.bundle import Bundle, flags_of_bundle, note_measurement
from twotower.calibration.quantization_plan import precision_of
from twotower.errors import BudgetError, BundleError, ConfigError
from twotower.evaluate.figures import draw_sensitivity
from twotower.evaluate.measure import Measured
from twotower.evaluate.quantization.candidates import Candidate, ChooseConfig
from twotower.evaluate.quantization.choose import choose
from twotower.evaluate.quantization.impact import ImpactConfig, compared, flags_of, note_of
from twotower.evaluate.quantization.quantization_page import impact_lines, impact_page
from twotower.evaluate.quantization.variants import (
    Pair,
    Variants,
    bytes_report,
    impact_of,
    parts_alone,
    require_pair,
)
from twotower.evaluate.suite import load_suite
from twotower.export.graphs.precision import Precision
from twotower.runtime import GenerationConfig, TwoTower

PROMPT = "Q: flip: a cat b red c lamp d owl e blue f kite g fox h bell i green j boat\nA:"


def figures(count: int, *, right: int, nfe: int, blocks: int, ms: float) -> Measured:
    times = ms + 5.0, 5.0
    return Measured.of(
        [(i < right, False, 16, nfe, blocks, *times, f"text {i}") for i in range(count)]
    )


def test_ratios_of_known_figures() -> None:
    """A pass twice as fast, half as many more of them: a third faster is what is left."""
    before = figures(100, right=100, nfe=4, blocks=2, ms=40)
    after = figures(100, right=97, nfe=6, blocks=2, ms=30)
    after.texts[0] = "another"
    result = compared(after, before)
    assert result["retention"]["value"] == pytest.approx(97)
    assert result["inflation"]["value"] == pytest.approx(1.5)
    assert result["step_time"]["value"] == pytest.approx(2.0)
    assert result["speedup"]["value"] == pytest.approx(2.0 / 1.5, rel=1e-5)
    assert result["passes_per_block"] == [2.0, 3.0]
    assert (result["lost"], result["won"], result["same_text"]) == (3, 0, 99)
    assert compared(before, before)["inflation"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_flags_name_the_budget_that_is_broken() -> None:
    config = ImpactConfig(budget=98.7, max_inflation=5)
    good = {"retention": {"value": 98.7}, "inflation": {"value": 1.05}}
    assert flags_of(good, config) == []
    none = {"value": None}
    (flag,) = flags_of({**good, "retention": {"value": 98.6}}, config)
    assert "below the budget of 98.7 %" in flag
    (flag,) = flags_of({**good, "inflation": {"value": 1.07}}, config)
    assert "needs 7.0 % more passes" in flag
    assert len(flags_of({"retention": none, "inflation": none}, config)) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("impact")


@pytest.fixture(scope="module")
def mixed(tiny_bundle: Path, folder: Path) -> Bundle:
    return quantized(tiny_bundle, folder, "mixed", rounding="mse")


def written(model: TwoTower) -> Any:
    steps: list[Any] = []
    config = GenerationConfig(max_new_tokens=48)
    tokens = model.generate(PROMPT, config, on_step=steps.append).tokens
    return tokens, np.concatenate([s.confidence for s in steps])


@pytest.mark.slow
def test_a_variant_of_everything_is_the_bundle_and_of_nothing_the_original(
    tiny_bundle: Path, mixed: Bundle, tmp_path: Path
) -> None:
    """To the last bit: the same graphs on the same files."""
    variants = Variants(Bundle.open(tiny_bundle), [mixed], tmp_path)
    for precision, path in ((Precision(), tiny_bundle), (precision_of(mixed), mixed.path)):
        with variants.open(precision) as variant, TwoTower.open(path) as model:
            (tokens, confidence), (expected, known) = written(variant), written(model)
            assert tokens == expected
            np.testing.assert_array_equal(confidence, known)


def test_parts_alone_differ_from_both_and_take_no_disk(
    tiny_bundle: Path, mixed: Bundle, tmp_path: Path
) -> None:
    parts = dict(parts_alone(mixed))
    kinds = ["embedding", "mamba", "attention", "routed_expert", "head"]
    assert list(parts) == [*kinds, "context tower", "denoiser tower"]
    variants = Variants(Bundle.open(tiny_bundle), [mixed], tmp_path)
    with TwoTower.open(tiny_bundle) as model:
        exact = written(model)[1]
    for name in ("mamba", "head"):
        with variants.open(parts[name]) as variant:
            confidence = written(variant)[1]
            assert len(confidence) != len(exact) or not np.array_equal(confidence, exact)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 2_000_000, "graphs, no weights"
    experts = parts["routed_expert"].weights
    other = Precision({name: replace(how, group=64) for name, how in experts.items()})
    with pytest.raises(ConfigError, match="no bundle holds"):
        variants.open(other)


@pytest.fixture(scope="module")
def report(tiny_bundle: Path, mixed: Bundle) -> dict[str, Any]:
    pair = require_pair(Bundle.open(tiny_bundle), mixed)
    assert pair == Pair(mixed, Bundle.open(tiny_bundle)), "whichever was named first"
    with TwoTower.open(mixed.path) as few, TwoTower.open(tiny_bundle) as exact:
        return impact_of(pair, (few, exact), load_suite().only(limit=2), ImpactConfig())


@pytest.mark.trained
@pytest.mark.slow
def test_the_report_has_everything(
    report: dict[str, Any], mixed: Bundle, tiny_bundle: Path
) -> None:
    assert report["suite"]["problems"] == 14
    assert set(report["settings"]) == {"float", "quantized", "float ar", "quantized ar"}
    assert list(report["sensitivity"])[-2:] == ["context tower", "denoiser tower"]
    assert report["compared"]["retention"]["value"] >= 90
    weights = report["bytes"]["weights"]
    assert weights["after"] < 0.4 * weights["before"] and weights["bfloat16"] < weights["before"]
    again = bytes_report(mixed, Bundle.open(tiny_bundle))
    assert all(report["bytes"][key] == again[key] for key in ("weights", "kinds"))
    kinds = report["bytes"]["kinds"]
    assert kinds["router"]["before"] == kinds["router"]["after"] > 0
    assert kinds["routed_expert"]["after"] < 0.2 * kinds["routed_expert"]["before"]
    assert json.loads(json.dumps(report)) == report


@pytest.mark.trained
@pytest.mark.slow
def test_lines_and_page_show_it(report: dict[str, Any]) -> None:
    lines = "\n".join(impact_lines(report))
    words = ("quantized ar", "passes/block", "denoiser tower", "of bfloat16", "inside the budget")
    assert all(word in lines for word in words)
    svg, png = draw_sensitivity(report)
    page = impact_page(report, svg, model="m")
    assert png.startswith(b"\x89PNG") and "all together" in svg
    for word in ("true speedup", "Bytes of the weights", "int4 in groups of 32", "By task", "<svg"):
        assert word in page
    assert "$" not in page.split("<script")[0], "every part of the page is filled in"
    flagged = impact_page({**report, "flags": ["keeps <nothing>"]}, "", model="m")
    assert "<b>Flagged:</b> keeps &lt;nothing&gt;" in flagged


@pytest.mark.trained
@pytest.mark.slow
def test_the_note_reaches_the_manifest_and_the_next_replaces_it(
    report: dict[str, Any], mixed: Bundle, tiny_bundle: Path
) -> None:
    note = note_of(report, report["compared"], "ort-cpu")
    note_measurement(mixed, {**note, "flags": ["is wrong"]})
    assert flags_of_bundle(Bundle.open(mixed.path)) == ["is wrong"]
    note_measurement(mixed, note)
    again = Bundle.open(mixed.path)
    assert flags_of_bundle(again) == [] and again.quantization is not None
    assert again.quantization["measured"]["retention"] == report["compared"]["retention"]
    with pytest.raises(BundleError, match="is not quantized"):
        note_measurement(Bundle.open(tiny_bundle), {})
    assert flags_of_bundle(Bundle.open(tiny_bundle)) == []


def test_pairs(tiny_bundle: Path, built_bundle: Path, mixed: Bundle) -> None:
    exact = Bundle.open(tiny_bundle)
    assert require_pair(exact, exact) is None
    assert require_pair(mixed, mixed) is None
    with pytest.raises(ConfigError, match="was not made from the checkpoint"):
        require_pair(mixed, Bundle.open(built_bundle))


@pytest.mark.trained
@pytest.mark.slow
def test_the_choice_is_inside_its_budget_and_says_how_it_came_about(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Attention in 4 bits costs this model a fifth of its answers: the search keeps it in 8."""
    config = ChooseConfig(impact=ImpactConfig(max_new_tokens=96))
    choice = choose(Bundle.open(tiny_bundle), load_suite().only(limit=8), config, tmp_path)
    recipe = choice.recipe
    assert recipe.weights["routed_expert"] == "int4"
    assert recipe.weights["attention"] == "int8"
    assert recipe.weights["head"] == recipe.weights["embedding"] == "int8", "never below 8 bits"
    alone = {(row["kind"], row["candidate"]): row for row in choice.report["alone"]}
    kept = {name: alone["attention", name]["retention"]["value"] for name in ("int4", "int8")}
    assert kept["int4"] < kept["int8"]
    last = [tried for tried in choice.report["tried"] if tried["half"] == 0][-1]
    assert {"kinds", "layers", "retention", "inflation"} <= set(last)
    checked = load_suite().only(limit=8).halves()[1]
    assert choice.report["check"]["problems"] == len(checked.problems)
    assert json.loads(json.dumps(choice.report))


@pytest.mark.slow
def test_a_budget_nothing_reaches_and_formats_there_are_not(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="names a format there is not"):
        ChooseConfig(impact=ImpactConfig(), formats=("int2",))
    with pytest.raises(ConfigError, match="cannot be asked for"):
        ChooseConfig(impact=ImpactConfig(budget=0))
    assert Candidate("int8", inputs=True).label == "int8, inputs too"
    monkeypatch.setattr(
        "twotower.evaluate.quantization.choose.flags_of", lambda facts, impact: ["never"]
    )
    config = ChooseConfig(impact=ImpactConfig(max_new_tokens=16))
    with pytest.raises(BudgetError, match="no layer kind can be quantized") as caught:
        choose(Bundle.open(tiny_bundle), load_suite().only(limit=2), config, tmp_path)
    assert "--budget" in caught.value.do
