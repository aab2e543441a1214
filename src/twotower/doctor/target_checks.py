"""Every check of one target: the small model through the chain, or the engines of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bench import measure_passes
from twotower.bundle import Bundle, Progress
from twotower.doctor.answer_check import KEPT_BY, check_answer, known_answer_of, setting_of
from twotower.doctor.canary import CheckResult, check_bundle, check_chain
from twotower.doctor.execution_check import check_execution
from twotower.hardware import Machine
from twotower.runtime import TwoTower

__all__ = ["TargetChecks"]


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
            lambda: nullcontext(model) if model.target == KEPT_BY else TwoTower.open(folder, target=KEPT_BY),
        )
        yield CheckResult("where the known answer comes from", None, source)
        if known is None:
            return
        on_gpu = model.target != KEPT_BY
        sm = self.machine.gpus[0].sm if on_gpu and self.machine.gpus else None
        plain = (lambda: self._opened(graphs=False)) if on_gpu else None
        yield from check_answer(known, model, setting_of(bundle, model.target, sm), open_plain=plain)

    def _passes(self, model: TwoTower) -> dict[str, Any]:
        assert self.bundle is not None
        bundle = Bundle.open(self.bundle, contents=False)
        dtype = setting_of(bundle, model.target).dtype
        return {"target": model.target, "dtype": dtype, **measure_passes(bundle, model).to_json()}
