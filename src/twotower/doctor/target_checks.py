"""Every check of one target: the small model through the chain, or the engines of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twotower.bench import measure_passes
from twotower.bundle import Bundle, Progress
from twotower.config import GenerationConfig
from twotower.doctor.answer_check import KEPT_BY, check_answer, known_answer_of, setting_of
from twotower.doctor.canary import CheckResult, check_bundle, check_chain
from twotower.errors import TwoTowerError
from twotower.hardware import Machine
from twotower.runtime import StepRecord, TwoTower

__all__ = ["TargetChecks", "check_execution"]


@dataclass(slots=True, kw_only=True)
class TargetChecks:
    """The checks of one target.

    Attributes:
        machine: What they run on.
        bundle: The bundle; None for a small random model, made for the checks.
        target: The target; None for the best of the bundle that runs here, which stands here once
            it is open.
        report: Also hold the engine against itself, and time its passes.
        progress: Called with (bytes checked, bytes to check) while a bundle is opened.
        loading: Called with (bytes loaded, bytes to load) while weights go to a device.
        opened: Called once it is open.
        say: Called with what is being done to the small model.
        passes: The times of a pass, once they are measured.
    """

    machine: Machine
    bundle: Path | None = None
    target: str | None = None
    report: bool = False
    progress: Progress | None = None
    loading: Progress | None = None
    opened: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda what: None
    passes: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> Iterator[CheckResult]:
        """The checks, one by one as they are made.

        Raises:
            TwoTowerError: the bundle or its engine cannot be opened.
        """
        if self.bundle is None:
            self.target = self.target or KEPT_BY
            yield from check_chain(self.say, self.target)
            return
        with self._opened(progress=self.progress, loading=self.loading) as model:
            self.opened()
            self.target = model.target
            yield from check_bundle(model)
            yield from self._answer(model)
            if self.report:
                self.passes.append(self._passes(model))
        if self.report and self.target != KEPT_BY:
            yield from check_execution(self._opened, devices=len(self.machine.gpus))

    def _opened(self, **options: Any) -> TwoTower:
        assert self.bundle is not None
        # Nothing is served: what is checked is compiled when it runs, and no more.
        return TwoTower.open(self.bundle, target=self.target, warm_up=(), **options)

    def _answer(self, model: TwoTower) -> Iterator[CheckResult]:
        """The known answer of the bundle, by this engine."""
        assert self.bundle is not None
        folder, bundle = self.bundle, Bundle.open(self.bundle, contents=False)
        known, source = known_answer_of(
            bundle,
            lambda: (
                nullcontext(model)
                if model.target == KEPT_BY
                else TwoTower.open(folder, target=KEPT_BY)
            ),
        )
        yield CheckResult("where the known answer comes from", None, source)
        if known is None:
            return
        on_gpu = model.target != KEPT_BY
        sm = self.machine.gpus[0].sm if on_gpu and self.machine.gpus else None
        plain = (lambda: self._opened(graphs=False)) if on_gpu else None
        yield from check_answer(
            known, model, setting_of(bundle, model.target, sm), open_plain=plain
        )

    def _passes(self, model: TwoTower) -> dict[str, Any]:
        assert self.bundle is not None
        bundle = Bundle.open(self.bundle, contents=False)
        dtype = setting_of(bundle, model.target).dtype
        return {"target": model.target, "dtype": dtype, **measure_passes(bundle, model).to_json()}


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

        yield _same(
            "keys and values in other memory for every block",
            wanted,
            lambda: _texts(model, prompts, on_step=relocate),
        )
    ways: dict[str, dict[str, Any]] = {"passes launched piece by piece": {"graphs": False}}
    if devices > 1:
        ways["a tower on each of two GPUs"] = {"devices": (0, 1)}
    for name, options in ways.items():
        yield _same(name, wanted, partial(_reopened, open_engine, prompts, **options))


def _prompts(model: TwoTower) -> list[list[int]]:
    c = model.config
    words = np.setdiff1d(
        np.arange(c.vocab_size), [c.mask_token_id, c.pad_token_id, *c.eos_token_ids]
    )
    return [np.random.default_rng(n).choice(words, n).tolist() for n in (9, 40)]


def _texts(model: TwoTower, prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    """Both modes: one prompt after the other, and together."""
    out: list[tuple[int, ...]] = []
    for mode in ("diffusion", "ar"):
        config = GenerationConfig(
            mode=mode, max_new_tokens=_TOKENS, confidence_threshold=0.5, ignore_eos=True
        )
        for some in ([prompts[0]], [prompts[1]], prompts):
            out += [result.tokens for result in model.generate(some, config, **options)]
    return out


def _reopened(
    open_engine: Callable[..., AbstractContextManager[TwoTower]],
    prompts: list[list[int]],
    **options: Any,
) -> list[tuple[int, ...]]:
    with open_engine(**options) as other:
        return _texts(other, prompts)


def _same(
    name: str, wanted: list[tuple[int, ...]], run: Callable[[], list[tuple[int, ...]]]
) -> CheckResult:
    try:
        seen = run()
    except TwoTowerError as e:
        return CheckResult(name, False, str(e))
    parted = [i for i, (a, b) in enumerate(zip(wanted, seen, strict=True)) if a != b]
    detail = f"{len(wanted)} texts of {_TOKENS} tokens" + (
        f", {len(parted)} of them differ" if parted else ", the same"
    )
    return CheckResult(name, not parted, detail)
