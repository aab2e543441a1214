"""The smallest formats inside a budget of quality and passes: kind by kind, then layer by layer, measured on problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twotower.builders import build_engines, builder_for
from twotower.bundle import GRAPH_FILES, Bundle
from twotower.calibration.quantize import QuantizeConfig, plan_quantization, quantize_bundle
from twotower.calibration.recipes import KEEP, Recipe, RecipeException, parts_of
from twotower.calibration.statistics_file import Statistics
from twotower.calibration.streaming import rounding_error
from twotower.config.formats import ACTIVATIONS, FORMATS
from twotower.errors import BudgetError, ConfigError
from twotower.evaluate.measure import Contestant, Measured, measure
from twotower.evaluate.price import PriceConfig, compared, flags_of
from twotower.evaluate.suite import Problem, Suite
from twotower.evaluate.variants import Mixer
from twotower.export.graphs import ActivationFormat, Precision, build_graph
from twotower.runtime import TwoTower

__all__ = ["Candidate", "Choice", "ChooseConfig", "choose"]

_TARGET = "ort-cpu"
_EIGHT_BITS_AT_LEAST = ("embedding", "head")
_FLOAT = "float"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to store a kind, and whether the inputs of its products are rounded too."""

    format: str
    inputs: bool = False

    @property
    def label(self) -> str:
        return f"{self.format}, inputs too" if self.inputs else self.format


KEPT = Candidate(KEEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseConfig:
    """What to search, and for what.

    Attributes:
        price: Budget of quality and passes, and the longest answer.
        formats: To try, smallest first; what a kind cannot be stored in is left out for it.
        group: Of int4.
        threads: Of the engines.
        quantize: How weights and ranges are rounded.
    """

    price: PriceConfig
    formats: tuple[str, ...] = ("int4", "int8")
    group: int = 32
    threads: int = 0
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            found = f"{', '.join(unknown) or 'none'}; allowed: {', '.join(FORMATS)}"
            raise ConfigError("--formats names a format there is not", found=found, do="write it like --formats int4,int8")
        if not 0 < self.price.budget <= 100 or self.price.max_inflation < 0:
            found = f"budget {self.price.budget}, inflation {self.price.max_inflation}"
            raise ConfigError("this budget cannot be asked for", found=found, do="name a budget of more than 0, up to 100 percent")


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

    Every kind is first measured alone in every format. Then all kinds take the smallest format that is inside the budget alone; while they
    are outside together, the kind that costs most gives way. Last, of kinds that had to, as many layers as the budget allows go back to the
    smaller format, those first whose weights lose least by it.

    Args:
        bundle: The float bundle; its `ort-cpu` engine is built if it is not there.
        suite: The problems.
        config: What to search.
        scratch: A folder on a disk with room for the model once in each format.
        statistics: Ranges; with them products of few bits on both sides are tried too.
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
                f"no layer kind can be quantized and keep {config.price.budget:g} % at {config.price.max_inflation:g} % more passes",
                found=f"the best of {len(alone)} is {best[0]} in {best[1].label}: {alone[best]['retention']['value']}",
                do="lower --budget, raise --max-inflation, or name wider --formats",
            )
        lowered = search.by_layer(chosen, tell)
        recipe = search.recipe(chosen, lowered)
        return Choice(recipe, search.report(alone, chosen, lowered, recipe, tell))


class _Search:
    """The measurements of one search; contestants are opened when they are asked for and closed after."""

    def __init__(self, bundle: Bundle, suite: Suite, config: ChooseConfig, stack: ExitStack) -> None:
        self._bundle, self._config, self._stack = bundle, config, stack
        self._halves = suite.halves()
        self._suite = suite
        graphs = [build_graph(name, bundle.config, bundle.dtype) for name in GRAPH_FILES]
        self._parts = [part for graph in graphs for part in parts_of(bundle.config, graph.weights)]
        self._kinds = tuple(dict.fromkeys(part.kind for part in self._parts))
        self._trail: list[dict[str, Any]] = []

    def prepare(self, scratch: Path, statistics: Statistics | None, tell: Callable[[str, int, int], None]) -> None:
        """Every format once, as a bundle that mixtures take their weights from."""
        build_engines(self._bundle, _TARGET, builder_for(_TARGET), report=tell)
        made: list[Bundle] = []
        held: list[Precision] = []
        self._activations: dict[str, dict[str, ActivationFormat]] = {}
        for name in self._config.formats:
            for inputs in (False, True) if statistics is not None and FORMATS[name].dtype in ACTIVATIONS else (False,):
                recipe = self._everything(name, inputs=inputs)
                plan = plan_quantization(self._bundle, recipe, self._config.quantize, statistics)
                self._activations.setdefault(name, {}).update(plan.precision.activations)
                if any(other.weights == plan.precision.weights for other in held):
                    continue  # the same weights: mixtures take them from the one that is there
                held.append(plan.precision)
                made.append(quantize_bundle(self._bundle, plan, scratch / f"{name}{'-inputs' if inputs else ''}", report=tell))
                build_engines(made[-1], _TARGET, builder_for(_TARGET))
        graphs = scratch / "graphs"
        graphs.mkdir()
        self._mixer = Mixer(self._bundle, made, graphs, threads=self._config.threads)
        self._float = self._stack.enter_context(TwoTower.open(self._bundle.path, _TARGET, threads=self._config.threads))
        price = self._config.price
        self._generation = replace(self._float.defaults, mode="diffusion", top_p=1.0, max_new_tokens=price.max_new_tokens)
        self._ladders = {kind: self._ladder(kind, inputs=statistics is not None) for kind in self._kinds}

    def alone(self, tell: Callable[[str, int, int], None]) -> dict[tuple[str, Candidate], dict[str, Any]]:
        """Every kind in every format, everything else as it is."""
        wanted = {(kind, c): {kind: c} for kind, ladder in self._ladders.items() for c in ladder}
        return self._measured(wanted, self._halves[0].problems, lambda done, total: tell("measuring kinds alone", done, total))

    def together(
        self, alone: Mapping[tuple[str, Candidate], dict[str, Any]], tell: Callable[[str, int, int], None]
    ) -> dict[str, Candidate]:
        """The smallest formats whose mixture is inside the budget."""
        chosen = {kind: next((c for c in ladder if self._inside(alone[kind, c])), KEPT) for kind, ladder in self._ladders.items()}
        while any(c != KEPT for c in chosen.values()):
            facts = self._of(chosen, {}, "measuring the mixture", tell)
            if self._inside(facts):
                break
            worst = max((kind for kind, c in chosen.items() if c != KEPT), key=lambda kind: self._cost(alone[kind, chosen[kind]]))
            ladder = self._ladders[worst]
            chosen[worst] = (*ladder, KEPT)[ladder.index(chosen[worst]) + 1]
        return chosen

    def by_layer(self, chosen: Mapping[str, Candidate], tell: Callable[[str, int, int], None]) -> dict[tuple[str, int, str], str]:
        """Layers that take the smallest format of their kind though the kind as a whole could not: (tower, layer, kind) -> format."""
        lowered: dict[tuple[str, int, str], str] = {}
        for kind, ladder in self._ladders.items():
            if not ladder or (chosen[kind] != KEPT and _bits(chosen[kind]) == _bits(ladder[0])):
                continue  # as small as it gets already
            smallest = ladder[0]
            order = self._layers_by_error(kind, smallest.format)
            few, many = 0, len(order)
            while few < many:  # the most layers that stay inside, as if costs only ever added up
                middle = (few + many + 1) // 2
                trial = {**lowered, **dict.fromkeys(order[:middle], smallest.format)}
                if self._inside(self._of(chosen, trial, f"measuring layers of {kind}", tell)):
                    few = middle
                else:
                    many = middle - 1
            lowered |= dict.fromkeys(order[:few], smallest.format)
        return lowered

    def recipe(self, chosen: Mapping[str, Candidate], lowered: Mapping[tuple[str, int, str], str]) -> Recipe:
        """The choice as a recipe."""
        price = self._config.price
        return Recipe(
            name="auto",
            summary=f"chosen by measuring: {price.budget:g} % of quality, {price.max_inflation:g} % more passes",
            weights={kind: c.format for kind, c in chosen.items() if c != KEPT},
            activations=tuple(kind for kind, c in chosen.items() if c.inputs),
            group=self._config.group,
            exceptions=tuple(RecipeException(tower=t, layer=i, kind=kind, format=f) for (t, i, kind), f in sorted(lowered.items())),
        )

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
            "suite": {"name": self._suite.name, "sha256": self._suite.sha256, "problems": len(self._suite.problems)},
            "budget": {"percent": self._config.price.budget, "max_inflation": self._config.price.max_inflation},
            "generation": self._generation.to_json(),
            "alone": [{"kind": kind, "candidate": c.label, **_short(facts)} for (kind, c), facts in alone.items()],
            "tried": self._trail,
            "chosen": {kind: c.label for kind, c in chosen.items()},
            "layers": [e.to_json() for e in recipe.exceptions],
            "check": check,
            "flags": flags_of(check, self._config.price),
        }

    def _everything(self, name: str, *, inputs: bool) -> Recipe:
        kinds = [kind for kind in self._kinds if self._fits(kind, name)]
        rounded = [k for k in kinds if k not in _EIGHT_BITS_AT_LEAST] if inputs and FORMATS[name].dtype in ACTIVATIONS else []
        return Recipe(name=name, weights=dict.fromkeys(kinds, name), activations=tuple(rounded), group=self._config.group)

    def _fits(self, kind: str, name: str) -> bool:
        how = FORMATS[name]
        group = self._config.group if name == "int4" else how.group
        if kind in _EIGHT_BITS_AT_LEAST and how.bits < 8:
            return False
        return not group or all(part.columns % group == 0 for part in self._parts if part.kind == kind)

    def _ladder(self, kind: str, *, inputs: bool) -> tuple[Candidate, ...]:
        """From the smallest up; of two as small the one whose products are faster first."""
        out: list[Candidate] = []
        for name in sorted(self._config.formats, key=lambda name: FORMATS[name].bits):
            if not self._fits(kind, name):
                continue
            if inputs and FORMATS[name].dtype in ACTIVATIONS and kind not in _EIGHT_BITS_AT_LEAST:
                out.append(Candidate(name, inputs=True))
            out.append(Candidate(name))
        return tuple(out)

    def _precision(self, chosen: Mapping[str, Candidate], lowered: Mapping[tuple[str, int, str], str]) -> Precision:
        plain = self.recipe(chosen, lowered)
        weights = {part.name: how for part in self._parts if (how := plain.format_of(part))}
        activations: dict[str, ActivationFormat] = {}
        for part in self._parts:
            if plain.rounds_input_of(part):
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
        """Figures of one mixture on one half of the problems."""
        model = self._mixer.open(self._precision(chosen, lowered))
        try:
            facts = self._against_float({"it": model}, self._halves[half].problems, lambda done, total: tell(what, done, total))["it"]
        finally:
            model.close()
        tried = {"kinds": {k: c.label for k, c in chosen.items()}, "layers": len(lowered), "half": half, **_short(facts)}
        self._trail.append(tried)
        return facts

    def _measured(
        self, wanted: Mapping[Any, Mapping[str, Candidate]], problems: Sequence[Problem], tick: Callable[[int, int], None]
    ) -> dict[Any, dict[str, Any]]:
        with ExitStack() as stack:
            models = {key: stack.enter_context(self._mixer.open(self._precision(chosen, {}))) for key, chosen in wanted.items()}
            return self._against_float(models, problems, tick)

    def _against_float(
        self, models: Mapping[Any, TwoTower], problems: Sequence[Problem], tick: Callable[[int, int], None]
    ) -> dict[Any, dict[str, Any]]:
        names = {key: str(i) for i, key in enumerate(models)}
        contestants = [Contestant(_FLOAT, self._float, self._generation)]
        contestants += [Contestant(names[key], model, self._generation) for key, model in models.items()]
        measured: dict[str, Measured] = measure(problems, contestants, tick)
        return {key: compared(measured[names[key]], measured[_FLOAT]) for key in models}

    def _inside(self, facts: Mapping[str, Any]) -> bool:
        return not flags_of(facts, self._config.price)

    def _cost(self, facts: Mapping[str, Any]) -> float:
        """Shares of the budgets that are used up, added."""
        price = self._config.price
        lost, more = 100 - (facts["retention"]["value"] or 0.0), 100 * ((facts["inflation"]["value"] or 1.0) - 1)
        return float(lost / max(100 - price.budget, 0.1) + more / max(price.max_inflation, 0.1))

    def _layers_by_error(self, kind: str, name: str) -> list[tuple[str, int, str]]:
        """Layers of a kind, those first whose weights a format changes least."""
        recipe = self._everything(name, inputs=False)
        errors: dict[tuple[str, int, str], float] = {}
        for part in self._parts:
            if part.kind == kind and part.layer is not None:
                how = recipe.format_of(part)
                assert how is not None
                key = (part.tower, part.layer, kind)
                error = rounding_error(self._bundle, part.name, how, rounding=self._config.quantize.rounding)
                errors[key] = max(errors.get(key, 0.0), error)
        return sorted(errors, key=errors.__getitem__)


def _bits(candidate: Candidate) -> int:
    return FORMATS[candidate.format].bits


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("retention", "inflation", "same_text")}
