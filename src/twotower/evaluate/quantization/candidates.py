"""Candidate formats of each layer kind, from the smallest up, and a choice as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from twotower.calibration.quantization_plan import QuantizeConfig
from twotower.calibration.recipes import KEEP, QuantizableWeight, Recipe, RecipeOverride
from twotower.config.formats import ACTIVATIONS, FORMATS
from twotower.errors import ConfigError
from twotower.evaluate.quantization.impact import ImpactConfig

_EIGHT_BITS_AT_LEAST = ("embedding", "head")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to store a kind, and whether the inputs of its products are rounded too."""

    format: str
    inputs: bool = False

    @property
    def label(self) -> str:
        """As a person reads it."""
        if self.inputs:
            return f"{self.format}, inputs too"
        return self.format

    @property
    def bits(self) -> int:
        """Of a weight."""
        return FORMATS[self.format].bits


KEPT = Candidate(KEEP)
"""As it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChooseConfig:
    """What to search, and for what.

    `impact` has the budget; `formats` come smallest first, and what a kind cannot be stored in is
    left out for it; `group` is of int4.
    """

    impact: ImpactConfig
    formats: tuple[str, ...] = ("int4", "int8")
    group: int = 32
    threads: int = 0
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            found = f"{', '.join(unknown) or 'none'}; allowed: {', '.join(FORMATS)}"
            raise ConfigError(
                "--formats names a format there is not",
                found=found,
                do="write it like --formats int4,int8",
            )
        if not 0 < self.impact.budget <= 100 or self.impact.max_inflation < 0:
            found = f"budget {self.impact.budget}, inflation {self.impact.max_inflation}"
            raise ConfigError(
                "this budget cannot be asked for",
                found=found,
                do="name a budget of more than 0, up to 100 percent",
            )


class Candidates:
    """The candidates of every layer kind of a model, of formats and group of `config`."""

    def __init__(self, parts: Sequence[QuantizableWeight], config: ChooseConfig) -> None:
        self._parts, self._config = parts, config
        self.kinds = tuple(dict.fromkeys(part.kind for part in parts))

    def everything(self, name: str, *, inputs: bool) -> Recipe:
        """All that can be, in one format; with the inputs of products where the format allows."""
        kinds = [kind for kind in self.kinds if self.fits(kind, name)]
        rounded = (
            [k for k in kinds if k not in _EIGHT_BITS_AT_LEAST]
            if inputs and FORMATS[name].dtype in ACTIVATIONS
            else []
        )
        return Recipe(
            name=name,
            weights=dict.fromkeys(kinds, name),
            activations=tuple(rounded),
            group=self._config.group,
        )

    def fits(self, kind: str, name: str) -> bool:
        """Whether a kind can, and may, be stored in a format."""
        how = FORMATS[name]
        group = self._config.group if name == "int4" else how.group
        if kind in _EIGHT_BITS_AT_LEAST and how.bits < 8:
            return False
        return not group or all(
            part.columns % group == 0 for part in self._parts if part.kind == kind
        )

    def candidates(self, kind: str, *, inputs: bool) -> tuple[Candidate, ...]:
        """From the smallest up; of two as small the one whose products are faster first."""
        out: list[Candidate] = []
        for name in sorted(self._config.formats, key=lambda name: FORMATS[name].bits):
            if not self.fits(kind, name):
                continue
            if inputs and FORMATS[name].dtype in ACTIVATIONS and kind not in _EIGHT_BITS_AT_LEAST:
                out.append(Candidate(name, inputs=True))
            out.append(Candidate(name))
        return tuple(out)

    def recipe(
        self, chosen: Mapping[str, Candidate], lowered: Mapping[tuple[str, int, str], str]
    ) -> Recipe:
        """The choice as a recipe."""
        impact = self._config.impact
        return Recipe(
            name="auto",
            summary=f"chosen by measuring: {impact.budget:g} % of quality, "
            f"{impact.max_inflation:g} % more passes",
            weights={kind: c.format for kind, c in chosen.items() if c != KEPT},
            activations=tuple(kind for kind, c in chosen.items() if c.inputs),
            group=self._config.group,
            exceptions=tuple(
                RecipeOverride(tower=t, layer=i, kind=kind, format=f)
                for (t, i, kind), f in sorted(lowered.items())
            ),
        )
