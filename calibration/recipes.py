"""Recipes: which layer kinds are stored in which format. They are data, read from TOML, checked here, and resolved to weights by name."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from twotower.checkpoint.layout import Role
from twotower.config import ModelConfig
from twotower.config.formats import ACTIVATIONS, FORMATS, GROUPS, WeightFormat, stored_format
from twotower.errors import RecipeError
from twotower.spec import DENOISER
from twotower.weights.declared import QUANTIZABLE, declared_weights

__all__ = [
    "KEEP",
    "QuantizableWeight",
    "Recipe",
    "RecipeOverride",
    "builtin_recipes",
    "load_recipe",
    "quantizable_weights",
]

KEEP = "keep"

KINDS = tuple(role.value for role in QUANTIZABLE)
"""Layer kinds a recipe may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOverride:
    """Weights that are treated otherwise; what is None matches everything.

    Attributes:
        tower: `context` or `denoiser`.
        layer: Number of the layer.
        kind: Layer kind.
        format: A format's name, or `keep`.
    """

    tower: str | None = None
    layer: int | None = None
    kind: str | None = None
    format: str = KEEP

    def matches(self, part: QuantizableWeight) -> bool:
        """Whether it is about that weight."""
        return (
            self.tower in (None, part.tower)
            and self.layer in (None, part.layer)
            and self.kind in (None, part.kind)
        )

    def to_json(self) -> dict[str, Any]:
        """What is set."""
        return {
            k: v
            for k, v in (
                ("tower", self.tower),
                ("layer", self.layer),
                ("kind", self.kind),
                ("format", self.format),
            )
            if v is not None
        }


@dataclass(frozen=True, slots=True)
class QuantizableWeight:
    """A weight a recipe may quantize.

    Attributes:
        name: Its name in a float graph.
        tower: `context` or `denoiser`.
        layer: Number of its layer; None for embedding and head.
        kind: Layer kind.
        columns: Length of its rows.
    """

    name: str
    tower: str
    layer: int | None
    kind: str
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is stored, and computed, in few bits.

    Attributes:
        name: Its name.
        summary: One sentence.
        weights: Layer kind -> name of a format.
        activations: Kinds whose products read their input in the weights' format too.
        group: Weights that share a scale in int4.
        exceptions: The last one that matches a weight decides.
    """

    name: str
    summary: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)
    activations: tuple[str, ...] = ()
    group: int = 32
    exceptions: tuple[RecipeOverride, ...] = ()

    def __post_init__(self) -> None:
        for kind in (
            *self.weights,
            *self.activations,
            *(e.kind for e in self.exceptions if e.kind is not None),
        ):
            _require(
                kind in KINDS, f"recipe {self.name!r} names a layer kind there is not", kind, KINDS
            )
        for name in self.weights.values():
            _require(
                name in FORMATS,
                f"recipe {self.name!r} names a format that ONNX opset 24 or this version cannot write",
                name,
                FORMATS,
            )
        for exception in self.exceptions:
            allowed = (*FORMATS, KEEP)
            _require(
                exception.format in allowed,
                f"recipe {self.name!r} has an exception with an unknown format",
                exception.format,
                allowed,
            )
            _require(exception.tower in (None, "context", "denoiser"), f"recipe {self.name!r} names a tower there is not", exception.tower,
                     ("context", "denoiser"))  # fmt: skip
        for kind in self.activations:
            chosen = self.weights.get(kind, KEEP)
            few = [name for name, f in FORMATS.items() if f.dtype in ACTIVATIONS]
            _require(
                chosen in few,
                f"recipe {self.name!r} cannot round the inputs of {kind}: its weights are in {chosen}",
                chosen,
                few,
            )
        _require(
            self.group in GROUPS,
            f"recipe {self.name!r} has a group that the kernels of experts do not take",
            self.group,
            GROUPS,
        )

    @classmethod
    def from_mapping(cls, name: str, data: Mapping[str, Any]) -> Recipe:
        """A recipe from a TOML table.

        Raises:
            RecipeError: unknown keys, kinds or formats, or values of another type.
        """
        known = ("summary", "weights", "activations", "group", "except")
        for key in data:
            _require(key in known, f"recipe {name!r} has a key there is not", key, known)
        try:
            exceptions = tuple(RecipeOverride(**entry) for entry in data.get("except", ()))
            return cls(
                name=name,
                summary=str(data.get("summary", "")),
                weights={str(k): str(v) for k, v in data.get("weights", {}).items()},
                activations=tuple(str(kind) for kind in data.get("activations", ())),
                group=int(data.get("group", 32)),
                exceptions=exceptions,
            )
        except (TypeError, ValueError, AttributeError) as e:
            raise RecipeError(
                f"recipe {name!r} is not written like one",
                found=str(e),
                do="see docs/quantization.md for the form",
            ) from e

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `from_mapping` reads it."""
        return {
            "summary": self.summary,
            "weights": dict(self.weights),
            "activations": list(self.activations),
            "group": self.group,
            "except": [e.to_json() for e in self.exceptions],
        }

    def format_of(self, part: QuantizableWeight) -> WeightFormat | None:
        """The format of a weight; None where it stays as it is."""
        name = self._name_of(part)
        if name == KEEP:
            return None
        stacked = part.kind == Role.ROUTED_EXPERT.value
        return stored_format(
            name,
            part.columns,
            stacked=stacked,
            rounded_input=self.quantizes_input_of(part),
            group=self.group,
        )

    def quantizes_input_of(self, part: QuantizableWeight) -> bool:
        """Whether the product with that weight reads few bits on both sides."""
        name = self._name_of(part)
        return part.kind in self.activations and name != KEEP and FORMATS[name].dtype in ACTIVATIONS

    def _name_of(self, part: QuantizableWeight) -> str:
        name = self.weights.get(part.kind, KEEP)
        for exception in self.exceptions:
            if exception.matches(part):
                name = exception.format
        return name

    def only(self, kinds: Iterable[str]) -> Recipe:
        """The part of it that concerns some kinds."""
        chosen = tuple(kinds)
        return replace(
            self,
            weights={k: v for k, v in self.weights.items() if k in chosen},
            activations=tuple(k for k in self.activations if k in chosen),
        )

    def check(self, parts: Sequence[QuantizableWeight]) -> None:
        """Refuses what this model's shapes do not allow.

        Raises:
            RecipeError: a group does not divide a row, or nothing is quantized.
        """
        chosen = [(part, how) for part in parts if (how := self.format_of(part))]
        if not chosen:
            kinds = sorted({part.kind for part in parts})
            raise RecipeError(
                f"recipe {self.name!r} changes nothing of this model",
                found=f"it names {', '.join(self.weights) or 'no kind'}; the model has {', '.join(kinds)}",
                do="choose a recipe that names a kind the model has",
            )
        for part, how in chosen:
            if how.group and part.columns % how.group:
                fitting = [g for g in GROUPS if part.columns % g == 0] if how.name == "int4" else []
                raise RecipeError(
                    f"{part.name} cannot be divided into groups of {how.group}",
                    found=f"its rows have {part.columns} weights; allowed groups: {', '.join(map(str, fitting)) or 'none'}",
                    do="choose another --group"
                    if fitting
                    else f"store {part.kind} in another format, int8 for instance",
                )


def builtin_recipes() -> dict[str, Recipe]:
    """The recipes that come along, by name."""
    text = (resources.files("twotower.calibration") / "data" / "recipes.toml").read_text(
        encoding="utf-8"
    )
    return {name: Recipe.from_mapping(name, table) for name, table in tomllib.loads(text).items()}


def load_recipe(wanted: str) -> Recipe:
    """A recipe by name, or of a TOML file (`mine.toml`, or `mine.toml:name` where the file has several).

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    known = builtin_recipes()
    if wanted in known:
        return known[wanted]
    path, _, name = wanted.partition(".toml:")
    if not (name or wanted.endswith(".toml")):
        found = f"recipes: {', '.join(known)}, auto"
        raise RecipeError(
            f"there is no recipe {wanted!r}",
            found=found,
            do="choose one of them, or name a .toml file with your own",
        )
    file = Path(f"{path}.toml" if name else wanted)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise RecipeError(
            f"cannot read the recipe file {file}",
            found=str(e),
            do="name a TOML file with a table a recipe",
        ) from e
    tables = {k: v for k, v in tables.items() if isinstance(v, dict)}
    chosen = name or (next(iter(tables)) if len(tables) == 1 else "")
    if chosen not in tables:
        found = f"tables: {', '.join(tables) or 'none'}"
        raise RecipeError(
            f"{file} has no recipe {chosen!r}",
            found=found,
            do=f"name one of them: --recipe {file}:NAME",
        )
    return Recipe.from_mapping(chosen, tables[chosen])


def quantizable_weights(config: ModelConfig, graph: str) -> list[QuantizableWeight]:
    """The weights of a float graph that recipes are about: embeddings and matrices of products."""
    tower = "denoiser" if graph == DENOISER else "context"
    return [
        QuantizableWeight(weight.name, tower, weight.layer, weight.role.value, weight.shape[-1])
        for weight in declared_weights(config, graph, config.dtype)
        if weight.quantizable
    ]


def _require(good: bool, what: str, found: Any, allowed: Iterable[Any]) -> None:
    if not good:
        choices = ", ".join(map(str, allowed))
        raise RecipeError(
            what,
            found=f"{found!r}; allowed: {choices}",
            do="correct the recipe (docs/quantization.md has the form)",
        )
