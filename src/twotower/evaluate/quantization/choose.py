"""The smallest formats inside a budget: kind by kind, then layer by layer, by measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.calibration.activation_statistics import Statistics
from twotower.calibration.quantization_plan import plan_quantization, quantizable_of
from twotower.calibration.quantize import quantize_bundle
from twotower.calibration.quantized_data import quantization_error
from twotower.calibration.recipes import Recipe
from twotower.config.formats import ACTIVATIONS, FORMATS
from twotower.errors import BudgetError
from twotower.evaluate.measure import Measured, Run, measure
from twotower.evaluate.quantization.candidates import (
    KEPT,
    Candidate,
    Candidates,
    ChooseConfig,
)
from twotower.evaluate.quantization.impact import compared, flags_of
from twotower.evaluate.quantization.variants import Variants
from twotower.evaluate.suite import Problem, Suite
from twotower.export.graphs.precision import ActivationFormat, Precision
from twotower.runtime import TwoTower

_TARGET = "ort-cpu"
_FLOAT = "float"


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
    tell = progress or (lambda what, done, total: None)
    with ExitStack() as stack:
        search = _Search(bundle, suite, config, stack)
        search.prepare(scratch, statistics, tell)
        alone = search.alone(tell)
        chosen = search.together(alone, tell)
        if all(candidate == KEPT for candidate in chosen.values()):
            best = max(alone, key=lambda key: alone[key]["retention"]["value"] or 0.0)
            raise BudgetError(
                f"no layer kind can be quantized and keep {config.impact.budget:g} % "
                f"at {config.impact.max_inflation:g} % more passes",
                found=f"the best of {len(alone)} is {best[0]} in {best[1].label}: "
                f"{alone[best]['retention']['value']}",
                do="lower --budget, raise --max-inflation, or name wider --formats",
            )
        lowered = search.by_layer(chosen, tell)
        recipe = search.formats.recipe(chosen, lowered)
        return Choice(recipe, search.report(alone, chosen, lowered, recipe, tell))


class _Search:
    """The measurements of one search; runs are opened when they are asked for and closed after."""

    def __init__(
        self, bundle: Bundle, suite: Suite, config: ChooseConfig, stack: ExitStack
    ) -> None:
        self._bundle, self._config, self._stack = bundle, config, stack
        self._halves = suite.halves()
        self._suite = suite
        self._parts = list(quantizable_of(bundle).values())
        self.formats = Candidates(self._parts, config)
        self._trail: list[dict[str, Any]] = []

    def prepare(
        self, scratch: Path, statistics: Statistics | None, tell: Callable[[str, int, int], None]
    ) -> None:
        """Every format once, as a bundle that variants take their weights from."""
        build_engines(self._bundle, _TARGET, builder_for(_TARGET), report=tell)
        made: list[Bundle] = []
        held: list[Precision] = []
        self._activations: dict[str, dict[str, ActivationFormat]] = {}
        for name in self._config.formats:
            for inputs in (
                (False, True)
                if statistics is not None and FORMATS[name].dtype in ACTIVATIONS
                else (False,)
            ):
                recipe = self.formats.everything(name, inputs=inputs)
                plan = plan_quantization(self._bundle, recipe, self._config.quantize, statistics)
                self._activations.setdefault(name, {}).update(plan.precision.activations)
                if any(other.weights == plan.precision.weights for other in held):
                    continue  # the same weights: variants take them from the one that is there
                held.append(plan.precision)
                made.append(
                    quantize_bundle(
                        self._bundle,
                        plan,
                        scratch / f"{name}{'-inputs' if inputs else ''}",
                        report=tell,
                    )
                )
                build_engines(made[-1], _TARGET, builder_for(_TARGET))
        graphs = scratch / "graphs"
        graphs.mkdir()
        self._variants = Variants(self._bundle, made, graphs, threads=self._config.threads)
        self._float = self._stack.enter_context(
            TwoTower.open(self._bundle.path, _TARGET, threads=self._config.threads)
        )
        impact = self._config.impact
        options, most = self._float.defaults.seeded(), impact.max_new_tokens
        self._generation = replace(options, mode="diffusion", top_p=1.0, max_new_tokens=most)
        self._candidates = {
            kind: self.formats.candidates(kind, inputs=statistics is not None)
            for kind in self.formats.kinds
        }

    def alone(
        self, tell: Callable[[str, int, int], None]
    ) -> dict[tuple[str, Candidate], dict[str, Any]]:
        """Every kind in every format, everything else as it is."""
        wanted = {
            (kind, c): {kind: c}
            for kind, candidates in self._candidates.items()
            for c in candidates
        }
        return self._measured(
            wanted,
            self._halves[0].problems,
            lambda done, total: tell("measuring kinds alone", done, total),
        )

    def together(
        self,
        alone: Mapping[tuple[str, Candidate], dict[str, Any]],
        tell: Callable[[str, int, int], None],
    ) -> dict[str, Candidate]:
        """The smallest formats whose variant is inside the budget."""
        chosen = {
            kind: next((c for c in candidates if self._inside(alone[kind, c])), KEPT)
            for kind, candidates in self._candidates.items()
        }
        while any(c != KEPT for c in chosen.values()):
            facts = self._of(chosen, {}, "measuring a variant", tell)
            if self._inside(facts):
                break
            worst = max(
                (kind for kind, c in chosen.items() if c != KEPT),
                key=lambda kind: self._cost(alone[kind, chosen[kind]]),
            )
            candidates = self._candidates[worst]
            chosen[worst] = (*candidates, KEPT)[candidates.index(chosen[worst]) + 1]
        return chosen

    def by_layer(
        self, chosen: Mapping[str, Candidate], tell: Callable[[str, int, int], None]
    ) -> dict[tuple[str, int, str], str]:
        """(tower, layer, kind) -> the smallest format, where a kind as a whole cannot take it."""
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
                if self._inside(
                    self._of(
                        chosen,
                        trial,
                        f"measuring layers of {kind}",
                        tell,
                    )
                ):
                    few = middle
                else:
                    many = middle - 1
            lowered |= dict.fromkeys(order[:few], smallest.format)
        return lowered

    def report(
        self,
        alone: Mapping[tuple[str, Candidate], dict[str, Any]],
        chosen: Mapping[str, Candidate],
        lowered: Mapping[tuple[str, int, str], str],
        recipe: Recipe,
        tell: Callable[[str, int, int], None],
    ) -> dict[str, Any]:
        """Everything measured, and the check on the half that was not chosen on."""
        check = self._of(chosen, lowered, "checking on the other half", tell, half=1)
        return {
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

    def _precision(
        self, chosen: Mapping[str, Candidate], lowered: Mapping[tuple[str, int, str], str]
    ) -> Precision:
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
        chosen: Mapping[str, Candidate],
        lowered: Mapping[tuple[str, int, str], str],
        what: str,
        tell: Callable[[str, int, int], None],
        *,
        half: int = 0,
    ) -> dict[str, Any]:
        """Figures of one variant on one half of the problems."""
        model = self._variants.open(self._precision(chosen, lowered))
        try:
            facts = self._against_float(
                {"it": model},
                self._halves[half].problems,
                lambda done, total: tell(what, done, total),
            )["it"]
        finally:
            model.close()
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
        wanted: Mapping[Any, Mapping[str, Candidate]],
        problems: Sequence[Problem],
        tick: Callable[[int, int], None],
    ) -> dict[Any, dict[str, Any]]:
        with ExitStack() as stack:
            models = {
                key: stack.enter_context(self._variants.open(self._precision(chosen, {})))
                for key, chosen in wanted.items()
            }
            return self._against_float(models, problems, tick)

    def _against_float(
        self,
        models: Mapping[Any, TwoTower],
        problems: Sequence[Problem],
        tick: Callable[[int, int], None],
    ) -> dict[Any, dict[str, Any]]:
        names = {key: str(i) for i, key in enumerate(models)}
        runs = [Run(_FLOAT, self._float, self._generation)]
        runs += [Run(names[key], model, self._generation) for key, model in models.items()]
        measured: dict[str, Measured] = measure(problems, runs, tick)
        return {key: compared(measured[names[key]], measured[_FLOAT]) for key in models}

    def _inside(self, facts: Mapping[str, Any]) -> bool:
        return not flags_of(facts, self._config.impact)

    def _cost(self, facts: Mapping[str, Any]) -> float:
        """Shares of the budgets that are used up, added."""
        impact = self._config.impact
        lost, more = (
            100 - (facts["retention"]["value"] or 0.0),
            100 * ((facts["inflation"]["value"] or 1.0) - 1),
        )
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
