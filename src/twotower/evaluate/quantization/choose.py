"""The smallest formats inside a budget: kind by kind, then layer by layer, by measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.calibration.activation_statistics import Statistics
from twotower.calibration.quantization_plan import plan_quantization, quantizable_of
from twotower.calibration.quantize import quantize_bundle
from twotower.calibration.quantized_data import quantization_error
from twotower.calibration.recipes import Recipe
from twotower.config.formats import ACTIVATIONS, FORMATS
from twotower.errors import BudgetError
from twotower.evaluate.evaluation import measured_preset
from twotower.evaluate.measure import Run, measure
from twotower.evaluate.quantization.candidates import (
    KEPT,
    Candidate,
    Candidates,
    ChooseConfig,
)
from twotower.evaluate.quantization.impact import compared, flags_of
from twotower.evaluate.quantization.variants import Variants
from twotower.evaluate.suite import Suite
from twotower.export.graphs.precision import ActivationFormat, Precision
from twotower.runtime import TwoTower

_TARGET = "ort-cpu"
_FLOAT = "float"
_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and everything that was measured on the way."""

    recipe: Recipe
    report: dict[str, Any]


def choose(
    bundle: Bundle,
    suite: Suite,
    config: ChooseConfig,
    scratch: Path,
    *,
    statistics: Statistics | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Choice:
    """Chooses on one half of the problems and checks on the other.

    Every kind is first measured alone in every format. Then all kinds take the smallest format that
    is inside the budget alone; while they are outside together, the kind that costs most gives way.
    Last, of kinds that had to, as many layers as the budget allows go back to the smaller format,
    those first whose weights lose least by it.

    Args:
        bundle: The float bundle; its `ort-cpu` engine is built if it is not there.
        suite: The problems.
        config: What to search.
        scratch: A folder on a disk with room for the model once in each format.
        statistics: Ranges; with them products quantized on both sides are tried too.
        progress: Called with (what, done, in all).

    Raises:
        BudgetError: nothing can be quantized inside the budget.
    """
    with ExitStack() as stack:
        search = _Search(bundle, suite, config, progress or (lambda what, done, total: None))
        search.prepare(scratch, statistics, stack)
        alone = search.alone()
        chosen = search.together(alone)
        if all(candidate == KEPT for candidate in chosen.values()):
            best = max(alone, key=lambda key: alone[key]["retention"]["value"] or 0.0)
            raise BudgetError(
                f"no layer kind can be quantized and keep {config.impact.budget:g} % "
                f"at {config.impact.max_inflation:g} % more passes",
                found=f"the best of {len(alone)} is {best[0]} in {best[1].label}: "
                f"{alone[best]['retention']['value']}",
                do="lower --budget, raise --max-inflation, or name wider --formats",
            )
        return search.choice(alone, chosen, search.by_layer(chosen))


_Tell = Callable[[str, int, int], None]
_Alone = dict[tuple[str, Candidate], dict[str, Any]]
"""Figures of a kind in a format."""

_Chosen = Mapping[str, Candidate]
_Lowered = Mapping[tuple[str, int, str], str]
"""(tower, layer, kind) -> the smallest format, where a kind as a whole cannot take it."""


class _Search:
    """The measurements of one search; runs are opened when they are asked for and closed after."""

    def __init__(
        self,
        bundle: Bundle,
        suite: Suite,
        config: ChooseConfig,
        tell: _Tell,
    ) -> None:
        self._bundle, self._suite = bundle, suite
        self._config, self._tell = config, tell
        self._halves = suite.halves()
        self._parts = list(quantizable_of(bundle).values())
        self.formats = Candidates(self._parts, config)
        self._trail: list[dict[str, Any]] = []

    def prepare(self, scratch: Path, statistics: Statistics | None, stack: ExitStack) -> None:
        """Every format once, as a bundle that variants take their weights from."""
        build_engines(self._bundle, _TARGET, builder_for(_TARGET), report=self._tell)
        made: list[Bundle] = []
        held: list[Precision] = []
        self._activations: dict[str, dict[str, ActivationFormat]] = {}
        for name in self._config.formats:
            both = statistics is not None and FORMATS[name].dtype in ACTIVATIONS
            for inputs in (False, True) if both else (False,):
                recipe = self.formats.everything(name, inputs=inputs)
                plan = plan_quantization(self._bundle, recipe, self._config.quantize, statistics)
                self._activations.setdefault(name, {}).update(plan.precision.activations)
                if any(other.weights == plan.precision.weights for other in held):
                    continue  # the same weights: variants take them from the one that is there
                held.append(plan.precision)
                output = scratch / f"{name}{'-inputs' if inputs else ''}"
                few = quantize_bundle(
                    self._bundle,
                    plan,
                    output,
                    report=self._tell,
                )
                build_engines(few, _TARGET, builder_for(_TARGET))
                made.append(few)
        graphs = scratch / "graphs"
        graphs.mkdir()
        self._variants = Variants(self._bundle, made, graphs, threads=self._config.threads)
        self._float = stack.enter_context(
            TwoTower.open(self._bundle.path, _TARGET, threads=self._config.threads)
        )
        most = self._config.impact.max_new_tokens
        self._generation = measured_preset(self._float, most)
        self._candidates = {
            kind: self.formats.candidates(kind, inputs=statistics is not None)
            for kind in self.formats.kinds
        }

    def alone(self) -> _Alone:
        """Every kind in every format, everything else as it is."""
        wanted: dict[tuple[str, Candidate], tuple[_Chosen, _Lowered]] = {}
        for kind, candidates in self._candidates.items():
            for candidate in candidates:
                wanted[kind, candidate] = ({kind: candidate}, {})
        return self._measured(wanted, "measuring kinds alone")

    def together(self, alone: _Alone) -> dict[str, Candidate]:
        """The smallest formats whose variant is inside the budget."""
        chosen = {
            kind: next((c for c in candidates if self._inside(alone[kind, c])), KEPT)
            for kind, candidates in self._candidates.items()
        }
        while any(c != KEPT for c in chosen.values()):
            facts = self._of(chosen, {}, "measuring a variant")
            if self._inside(facts):
                break
            worst = max(
                (kind for kind, c in chosen.items() if c != KEPT),
                key=lambda kind: self._cost(alone[kind, chosen[kind]]),
            )
            candidates = self._candidates[worst]
            chosen[worst] = (*candidates, KEPT)[candidates.index(chosen[worst]) + 1]
        return chosen

    def by_layer(self, chosen: _Chosen) -> _Lowered:
        """The layers that can be smaller than their kind."""
        lowered: dict[tuple[str, int, str], str] = {}
        for kind, candidates in self._candidates.items():
            if not candidates or (chosen[kind] != KEPT and chosen[kind].bits == candidates[0].bits):
                continue  # as small as it gets already
            smallest = candidates[0]
            order = self._layers_by_error(kind, smallest.format)
            few, many = 0, len(order)
            while few < many:  # the most layers that stay inside, as if costs only ever added up
                middle = (few + many + 1) // 2
                trial = {**lowered, **dict.fromkeys(order[:middle], smallest.format)}
                facts = self._of(chosen, trial, f"measuring layers of {kind}")
                if self._inside(facts):
                    few = middle
                else:
                    many = middle - 1
            lowered |= dict.fromkeys(order[:few], smallest.format)
        return lowered

    def choice(self, alone: _Alone, chosen: _Chosen, lowered: _Lowered) -> Choice:
        """Everything measured, and the check on the half that was not chosen on."""
        recipe = self.formats.recipe(chosen, lowered)
        check = self._of(chosen, lowered, "checking on the other half", half=1)
        report = {
            "suite": {
                "name": self._suite.name,
                "sha256": self._suite.sha256,
                "problems": len(self._suite.problems),
            },
            "budget": {
                "percent": self._config.impact.budget,
                "max_inflation": self._config.impact.max_inflation,
            },
            "generation": self._generation.to_json(),
            "alone": [
                {"kind": kind, "candidate": c.label, **_short(facts)}
                for (kind, c), facts in alone.items()
            ],
            "tried": self._trail,
            "chosen": {kind: c.label for kind, c in chosen.items()},
            "layers": [e.to_json() for e in recipe.exceptions],
            "check": check,
            "flags": flags_of(check, self._config.impact),
        }
        return Choice(recipe, report)

    def _precision(self, chosen: _Chosen, lowered: _Lowered) -> Precision:
        plain = self.formats.recipe(chosen, lowered)
        weights = {part.name: how for part in self._parts if (how := plain.format_of(part))}
        activations: dict[str, ActivationFormat] = {}
        for part in self._parts:
            if plain.quantizes_input_of(part):
                known = self._activations[weights[part.name].name]
                activations |= {name: how for name, how in known.items() if name == part.name}
        return Precision(weights, activations)

    def _of(
        self,
        chosen: _Chosen,
        lowered: _Lowered,
        what: str,
        *,
        half: int = 0,
    ) -> dict[str, Any]:
        """Figures of one variant, which is noted as tried."""
        facts = self._measured({"": (chosen, lowered)}, what, half=half)[""]
        tried = {
            "kinds": {k: c.label for k, c in chosen.items()},
            "layers": len(lowered),
            "half": half,
            **_short(facts),
        }
        self._trail.append(tried)
        return facts

    def _measured(
        self,
        wanted: Mapping[_Key, tuple[_Chosen, _Lowered]],
        what: str,
        *,
        half: int = 0,
    ) -> dict[_Key, dict[str, Any]]:
        """Figures of variants against the float bundle, on one half of the problems."""
        with ExitStack() as stack:
            runs = [Run(_FLOAT, self._float, self._generation)]
            for number, variant in enumerate(wanted.values()):
                model = stack.enter_context(self._variants.open(self._precision(*variant)))
                runs.append(Run(f"{number}", model, self._generation))
            measured = measure(
                self._halves[half].problems,
                runs,
                partial(self._tell, what),
            )
        before = measured.pop(_FLOAT)
        return {
            key: compared(after, before)
            for key, after in zip(wanted, measured.values(), strict=True)
        }

    def _inside(self, facts: Mapping[str, Any]) -> bool:
        return not flags_of(facts, self._config.impact)

    def _cost(self, facts: Mapping[str, Any]) -> float:
        """Shares of the budgets that are used up, added."""
        impact = self._config.impact
        lost = 100 - (facts["retention"]["value"] or 0.0)
        more = 100 * ((facts["inflation"]["value"] or 1.0) - 1)
        return float(lost / max(100 - impact.budget, 0.1) + more / max(impact.max_inflation, 0.1))

    def _layers_by_error(self, kind: str, name: str) -> list[tuple[str, int, str]]:
        """Layers of a kind, those first whose weights a format changes least."""
        recipe = self.formats.everything(name, inputs=False)
        errors: dict[tuple[str, int, str], float] = {}
        for part in self._parts:
            if part.kind == kind and part.layer is not None:
                how = recipe.format_of(part)
                assert how is not None
                key = (part.tower, part.layer, kind)
                error = quantization_error(
                    self._bundle, part.name, how, rounding=self._config.quantize.rounding
                )
                errors[key] = max(errors.get(key, 0.0), error)
        return sorted(errors, key=errors.__getitem__)


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("retention", "inflation", "same_text")}
