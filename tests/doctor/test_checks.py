"""The doctor's checks find what they are named after: each is shown the failure it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import bundle_with_engines, open_fake
from twotower.doctor.checks import CheckResult, check_bundle, check_chain, check_execution
from twotower.errors import EngineOutputError
from twotower.runtime import TwoTower

BATCH = "output is independent of batch composition"
STATE = "prefill and token-by-token decoding agree"


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
    return replace(result, tokens=(*result.tokens[:-1], token))


def test_a_sound_bundle_passes(model: TwoTower) -> None:
    results = outcomes(model)
    assert {BATCH, STATE, "confidences are finite", "no mask token in the text"} <= set(results)
    assert not [r for r in results.values() if r.ok is False]


def last_row(model: TwoTower, result: Any) -> Any:
    return [*result[:-1], altered(result[-1], 7)]


@pytest.mark.parametrize(
    ("call", "change", "found_by"),
    [
        (2, last_row, BATCH),
        (4, lambda model, result: altered(result, 7), STATE),
        (
            1,
            lambda model, result: altered(result, model.config.mask_token_id),
            "no mask token in the text",
        ),
    ],
)
def test_what_differs_is_found(model: TwoTower, call: int, change: Any, found_by: str) -> None:
    """In a batch, in its state, and a mask token in the text."""

    def changed(number: int, result: Any) -> Any:
        return change(model, result) if number == call else result

    result = outcomes(Tampered(model, changed))[found_by]
    assert result.ok is False
    if found_by == BATCH:
        assert "differ from token 47" in result.detail


def test_an_engine_that_fails_is_reported_and_not_raised(model: TwoTower) -> None:
    def change(call: int, result: Any) -> Any:
        raise EngineOutputError("NaN", found="NaN", do="build again")

    (result,) = check_bundle(Tampered(model, change))  # type: ignore[arg-type]
    assert result.ok is False
    assert "build again" in result.detail


@pytest.mark.slow
def test_a_loop_that_computes_something_else_fails_the_chain(
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
    assert failed == {"reference answer, diffusion", "reference answer, ar"}


# An engine on a GPU against itself.

Fault = Callable[[FakeCuda, FakeTensorRT], None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bundle_with_engines("hybrid-b", tmp_path_factory.mktemp("execution") / "bundle")


def outcome(bundle: Any, inject: Fault | None = None) -> dict[str, bool | None]:
    @contextmanager
    def open_(**options: Any) -> Iterator[TwoTower]:
        api = FakeCuda(devices=2)
        trt = FakeTensorRT(api)
        if inject:
            inject(api, trt)
        with TwoTower.from_towers(open_fake(bundle, trt, **options)) as model:
            yield model

    return {result.name: result.ok for result in check_execution(open_, devices=2)}


COPIED, LAUNCHED, TWO = (
    "keys and values in other memory for every block",
    "passes launched piece by piece",
    "a tower on each of two GPUs",
)


@pytest.mark.slow
def test_a_sound_engine_passes(bundle: Any) -> None:
    assert outcome(bundle) == {COPIED: True, LAUNCHED: True, TWO: True}


@pytest.mark.parametrize(("graph", "found_by"), [("hidden", LAUNCHED), ("", "generation as usual")])
def test_graphs_that_replay_old_numbers_are_found(bundle: Any, graph: str, found_by: str) -> None:
    """The defect of a library that records nothing: a replay leaves outputs as they were.

    Those of the context tower (`hidden`) or of all.
    """

    def inject(api: FakeCuda, trt: FakeTensorRT) -> None:
        recorded = api.cudaStreamEndCapture

        def empty(stream: int) -> tuple[int, int]:
            answer = recorded(stream)
            if trt.log[-1].startswith(f"execute {graph}"):
                api._graphs[answer[1]].clear()
            return answer

        api.cudaStreamEndCapture = empty

    assert outcome(bundle, inject)[found_by] is False


@pytest.mark.slow
def test_a_cache_that_is_kept_elsewhere_is_found(bundle: Any) -> None:
    """The defect of an update that does not reach the buffer the caller bound.

    The library's own copy lasts as long as its context.
    """

    def inject(api: FakeCuda, trt: FakeTensorRT) -> None:
        api.cudaMemcpy2DAsync = lambda *_: (0, None)  # what is moved to other memory is not there

    assert outcome(bundle, inject)[COPIED] is False
