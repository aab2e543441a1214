"""Ways of running one engine that must write one text: replayed or launched, in this memory or other, on one GPU or two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from twotower.config import GenerationConfig
from twotower.doctor.canary import CheckResult
from twotower.errors import TwoTowerError
from twotower.runtime import StepRecord, TwoTower

__all__ = ["check_execution"]

OpenEngine = Callable[..., AbstractContextManager[TwoTower]]

_TOKENS = 48


def check_execution(open_engine: OpenEngine, *, devices: int) -> Iterator[CheckResult]:
    """Checks of an engine on a GPU against itself; it is opened once for each way, one at a time, as two might not fit.

    Args:
        open_engine: Opens it with options of `TwoTower.open` (`graphs`, `devices`).
        devices: GPUs of this machine.
    """
    with open_engine() as model:
        prompts = _prompts(model)
        try:
            wanted = _texts(model, prompts)
        except TwoTowerError as e:
            yield CheckResult("generation as usual", False, str(e))
            return

        def relocate(record: StepRecord) -> None:
            if record.step == 0:
                model.relocate()

        yield _same("keys and values in other memory for every block", wanted, lambda: _texts(model, prompts, on_step=relocate))
    ways: dict[str, dict[str, Any]] = {"passes launched piece by piece": {"graphs": False}}
    if devices > 1:
        ways["a tower on each of two GPUs"] = {"devices": (0, 1)}
    for name, options in ways.items():
        yield _same(name, wanted, lambda options=options: _reopened(open_engine, prompts, **options))  # type: ignore[misc]


def _prompts(model: TwoTower) -> list[list[int]]:
    c = model.config
    words = np.setdiff1d(np.arange(c.vocab_size), [c.mask_token_id, c.pad_token_id, *c.eos_token_ids])
    return [np.random.default_rng(n).choice(words, n).tolist() for n in (9, 40)]


def _texts(model: TwoTower, prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    """Both modes: one prompt after the other, and together."""
    out: list[tuple[int, ...]] = []
    for mode in ("diffusion", "ar"):
        config = GenerationConfig(mode=mode, max_new_tokens=_TOKENS, confidence_threshold=0.5, ignore_eos=True)
        for some in ([prompts[0]], [prompts[1]], prompts):
            out += [result.tokens for result in model.generate(some, config, **options)]
    return out


def _reopened(
    open_engine: Callable[..., AbstractContextManager[TwoTower]], prompts: list[list[int]], **options: Any
) -> list[tuple[int, ...]]:
    with open_engine(**options) as other:
        return _texts(other, prompts)


def _same(name: str, wanted: list[tuple[int, ...]], run: Callable[[], list[tuple[int, ...]]]) -> CheckResult:
    try:
        seen = run()
    except TwoTowerError as e:
        return CheckResult(name, False, str(e))
    parted = [i for i, (a, b) in enumerate(zip(wanted, seen, strict=True)) if a != b]
    detail = f"{len(wanted)} texts of {_TOKENS} tokens" + (f", {len(parted)} of them differ" if parted else ", the same")
    return CheckResult(name, not parted, detail)
