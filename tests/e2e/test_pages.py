"""Pages of the trained model in a real browser: replays, and reports that sort."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import open_page
from tests.helpers.fake_model import FakeModel, problem
from tests.helpers.quantized import quantized
from twotower.bundle import Bundle
from twotower.config import GenerationConfig
from twotower.evaluate.evaluation import EvaluationConfig, evaluate
from twotower.evaluate.evaluation_page import report_page
from twotower.evaluate.figures import draw_curve, draw_sensitivity
from twotower.evaluate.quantization.impact import ImpactConfig
from twotower.evaluate.quantization.quantization_page import impact_page
from twotower.evaluate.quantization.variants import Pair, impact_of
from twotower.evaluate.suite import Suite, load_suite
from twotower.runtime import TwoTower
from twotower.trace import record_trace, trace_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
REQUESTED = "return performance.getEntriesByType('resource').map(e => e.name)"
STATES = "return [...document.querySelectorAll('#blocks .cell')].map(c => c.dataset.state)"
PROMPT = "Q: sort: q c x a m b t e z k p d r h\nA:"


def test_the_replay_shows_every_pass_as_it_was(
    browser: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    # Several passes a block, however sure the model is.
    sparing = GenerationConfig(confidence_threshold=1.0, steps_per_block=6)
    with TwoTower.open(tiny_bundle) as model:
        trace = record_trace(model, PROMPT, sparing, bundle="tiny")
    assert len(trace.steps) > 3
    page = open_page(browser, tmp_path, trace_page(trace))
    filled: set[int] = set()
    for step in trace.steps:
        first = step.block * trace.header.block_size
        now = {first + position for position in step.committed}
        filled |= now
        shown = page.execute_script(STATES)
        assert len(shown) == trace.header.block_size * len(trace.blocks)
        assert {i for i, state in enumerate(shown) if state == "just"} == now
        assert {i for i, state in enumerate(shown) if state in ("just", "earlier")} == filled
        page.find_element("id", "forward").click()
    assert trace.end.text is not None
    assert trace.end.text.strip() in page.find_element("id", "text").text


def test_the_evaluation_page_sorts_its_tables_and_needs_no_network(
    browser: Any, tmp_path: Path
) -> None:
    problems = tuple(
        problem(kind, i) for kind in ("sums", "words", "<b>flip</b>") for i in range(8)
    )
    model = FakeModel(problems)
    config = EvaluationConfig(thresholds=(0.5, 0.9), steps=(2, 16), budget=98.7)
    report = evaluate(model, Suite("s", "0" * 64, problems), config)  # type: ignore[arg-type]
    report["bundle"] = {"name": "b", "target": "fake"}
    curve, png = draw_curve(report)
    assert png.startswith(b"\x89PNG")
    page = open_page(browser, tmp_path, report_page(report, curve, model="m"))
    assert page.find_elements("css selector", ".picture svg")
    assert not page.execute_script(REQUESTED)
    assert json.loads(page.find_element("id", "report").get_attribute("textContent")) == json.loads(
        json.dumps(report)
    )

    def first_column() -> list[str]:
        heads = page.find_elements("css selector", "table:first-of-type tbody th")
        return [e.text for e in heads][:3]

    before = first_column()
    assert before == ["<b>flip</b>", "sums", "words"]
    head = page.find_element("css selector", "table thead th")
    head.click()
    assert first_column() == before[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    head.click()
    assert first_column() == before


def test_the_impact_of_quantization_is_shown_and_sorts(
    browser: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    exact, few = Bundle.open(tiny_bundle), quantized(tiny_bundle, tmp_path, "mixed")
    with TwoTower.open(few.path) as changed, TwoTower.open(tiny_bundle) as model:
        report = impact_of(
            Pair(few, exact), (changed, model), load_suite().only(limit=1), ImpactConfig()
        )
    page = open_page(browser, tmp_path, impact_page(report, draw_sensitivity(report)[0], model="m"))
    assert len(page.find_elements("css selector", ".card")) == 5
    assert page.find_elements("css selector", ".picture svg")
    assert not page.execute_script(REQUESTED)
    kinds = [e.text for e in page.find_elements("css selector", "h2 + .wide tbody th")]
    assert {"float", "quantized", "routed_expert", "all weights"} <= set(kinds)
    table = page.find_elements("css selector", "table")[1]
    table.find_elements("css selector", "thead th")[2].click()
    first = table.find_element("css selector", "tbody th").text
    assert first == "routed_expert", "the largest first; totals stay at the end"
