"""The doctor's checks find what they are named after: each is shown the failure it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.doctor.canary import CheckResult, check_bundle, check_chain
from twotower.errors import EngineOutputError
from twotower.runtime import TwoTower

NEIGHBOURS = "a text does not depend on its neighbours"
STATE = "tokens read one by one and as a prompt give the same state"


def outcomes(model: Any) -> dict[str, CheckResult]:
    return {r.name: r for r in check_bundle(model)}


@pytest.fixture
def model(built_bundle: Path) -> Any:
    with TwoTower.open(built_bundle, target="ort-cpu") as opened:
        yield opened


class Tampered:
    """A model whose results a test changes on their way out."""

    def __init__(self, model: TwoTower, change: Any) -> None:
        self.config = model.config
        self._model, self._change, self._calls = model, change, 0

    def generate(self, prompt: Any, config: Any, **options: Any) -> Any:
        self._calls += 1
        return self._change(self._calls, self._model.generate(prompt, config, **options))


def altered(result: Any, token: int) -> Any:
    import dataclasses

    return dataclasses.replace(result, tokens=(*result.tokens[:-1], token))


def test_a_sound_bundle_passes(model: TwoTower) -> None:
    results = outcomes(model)
    assert {NEIGHBOURS, STATE, "confidences are finite", "no mask token in the text"} <= set(
        results
    )
    assert not [r for r in results.values() if r.ok is False]


def test_rows_that_differ_in_company_are_found(model: TwoTower) -> None:
    def change(call: int, result: Any) -> Any:
        return [*result[:-1], altered(result[-1], 7)] if call == 2 else result

    result = outcomes(Tampered(model, change))[NEIGHBOURS]
    assert result.ok is False
    assert "part at token 47" in result.detail


def test_a_state_that_differs_is_found(model: TwoTower) -> None:
    result = outcomes(
        Tampered(model, lambda call, result: altered(result, 7) if call == 4 else result)
    )[STATE]
    assert result.ok is False


def test_a_mask_token_in_the_text_is_found(model: TwoTower) -> None:
    mask = model.config.mask_token_id
    results = outcomes(
        Tampered(model, lambda call, result: altered(result, mask) if call == 1 else result)
    )
    assert results["no mask token in the text"].ok is False


def test_an_engine_that_fails_is_reported_and_not_raised(model: TwoTower) -> None:
    def change(call: int, result: Any) -> Any:
        raise EngineOutputError("NaN", found="NaN", do="build again")

    (result,) = check_bundle(Tampered(model, change))  # type: ignore[arg-type]
    assert result.ok is False
    assert "build again" in result.detail


def test_a_loop_that_computes_something_else_fails_the_known_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import twotower.model.reference as reference

    real = reference.reference_generate

    def wrong(towers: Any, prompt: Any, config: Any) -> Any:
        result = real(towers, prompt, config)
        result.tokens[-1] = int(np.uint8(result.tokens[-1] + 1))
        return result

    monkeypatch.setattr(reference, "reference_generate", wrong)
    failed = {r.name for r in check_chain() if r.ok is False}
    assert failed == {"known answer, diffusion", "known answer, ar"}
