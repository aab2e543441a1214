"""Every check of one target: the small model through the chain, or the engines of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.bench import measure_passes
from twotower.bundle import Bundle, Progress, load_engine_record
from twotower.doctor.checks import CheckResult, check_bundle, check_chain, check_execution
from twotower.doctor.reference_answer import REFERENCE_TARGET, check_answer, reference_answer_of
from twotower.hardware import Machine
from twotower.runtime import TwoTower


@dataclass(slots=True, kw_only=True)
class TargetChecks:
    """The checks of one target.

    `bundle` None means a small random model, `target` None the bundle's best one that runs here,
    set once it is open. `report` also holds the engine against itself and times its passes.
    `progress` is called with (bytes checked, bytes to check), `loading` with (bytes loaded, bytes
    to load).
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
        """The checks as they are made; TwoTowerError if bundle or engine cannot be opened."""
        if self.bundle is None:
            self.target = self.target or REFERENCE_TARGET
            yield from check_chain(self.say, self.target)
            return
        with self._opened(progress=self.progress, loading=self.loading) as model:
            self.opened()
            self.target = model.target
            bundle = Bundle.open(self.bundle, contents=False)
            dtype = load_engine_record(bundle, model.target).dtype
            yield from check_bundle(model)
            yield from self._answer(bundle, model, dtype)
            if self.report:
                times = measure_passes(bundle, model).to_json()
                self.passes.append({"target": model.target, "dtype": dtype, **times})
        if self.report and self.target != REFERENCE_TARGET:
            yield from check_execution(self._opened, devices=len(self.machine.gpus))

    def _opened(self, **options: Any) -> TwoTower:
        assert self.bundle is not None
        # Nothing is served: what is checked is compiled when it runs, and no more.
        return TwoTower.open(self.bundle, target=self.target, warm_up=(), **options)

    def _answer(self, bundle: Bundle, model: TwoTower, dtype: str) -> Iterator[CheckResult]:
        """The reference answer of the bundle, by this engine."""
        is_reference = model.target == REFERENCE_TARGET

        def open_reference() -> Any:
            if is_reference:
                return nullcontext(model)
            return TwoTower.open(bundle.path, target=REFERENCE_TARGET)

        reference, source = reference_answer_of(bundle, open_reference)
        yield CheckResult("source of the reference answer", None, source)
        if reference is not None:
            plain = None if is_reference else lambda: self._opened(graphs=False)
            yield from check_answer(reference, model, dtype, open_plain=plain)
