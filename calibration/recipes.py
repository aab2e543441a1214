"""Recipes: which layer kinds are stored in which format; data, read from TOML and checked here."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from twotower.checkpoint.layout import Role
from twotower.config import ModelConfig
from twotower.config.formats import ACTIVATIONS, FORMATS, GROUPS, WeightFormat, stored_format
from twotower.errors import RecipeError
from twotower.records import RecordError, decode, encode, stored
from twotower.spec import DENOISER
from twotower.weights.declared import QUANTIZABLE, declared_weights

KEEP = "keep"

KINDS = tuple(role.value for role in QUANTIZABLE)
"""Layer kinds a recipe may name."""

TOWERS = ("context", "denoiser")


@dataclass(frozen=True, slots=True)
class QuantizableWeight:
    """A weight a recipe may quantize, by its name in a float graph.

    `layer` is None for embedding and head; `columns` is the length of its rows.
    """

    name: str
    tower: str
    layer: int | None
    kind: str
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOverride:
    """Weights treated otherwise (a format's name, or `keep`); what is None matches everything."""

    tower: str | None = None
    layer: int | None = None
    kind: str | None = None
    format: str = KEEP

    def matches(self, weight: QuantizableWeight) -> bool:
        """Whether it is about that weight."""
        return (
            self.tower in (None, weight.tower)
            and self.layer in (None, weight.layer)
            and self.kind in (None, weight.kind)
        )

    def to_json(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is stored, and computed, quantized.

    `weights` has format names by layer kind; products of kinds in `activations` read their input in
    the weights' format too; `group` weights share a scale in int4; of `exceptions` the last one
    that matches a weight decides.
    """

    name: str
    summary: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)
    activations: tuple[str, ...] = ()
    group: int = 32
    exceptions: tuple[RecipeOverride, ...] = field(default=(), metadata=stored("except"))

    def __post_init__(self) -> None:
        of = f"recipe {self.name!r}"
        overrides = self.exceptions
        named = [override.kind for override in overrides if override.kind is not None]
        for kind in (*self.weights, *self.activations, *named):
            _require(kind, KINDS, f"{of} names a layer kind there is not")
        for name in self.weights.values():
            unknown = "names a format that ONNX opset 24 or this version cannot write"
            _require(name, FORMATS, f"{of} {unknown}")
        for override in overrides:
            unknown = "has an exception with an unknown format"
            _require(
                override.format,
                (*FORMATS, KEEP),
                f"{of} {unknown}",
            )
            if override.tower is not None:
                _require(override.tower, TOWERS, f"{of} names a tower there is not")
        fitting = [name for name, how in FORMATS.items() if how.dtype in ACTIVATIONS]
        for kind in self.activations:
            chosen = self.weights.get(kind, KEEP)
            why = f"cannot quantize the inputs of {kind}: its weights are in {chosen}"
            _require(chosen, fitting, f"{of} {why}")
        _require(self.group, GROUPS, f"{of} has a group that the kernels of experts do not take")

    @classmethod
    def from_mapping(cls, name: str, data: Mapping[str, Any]) -> Recipe:
        """A recipe from a TOML table; RecipeError for unknown keys or unusable values."""
        try:
            return decode(cls, data, name=name)
        except RecordError as e:
            raise RecipeError(
                f"recipe {name!r} is not written like one",
                found=str(e),
                do="see docs/quantization.md for the form",
            ) from e

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `from_mapping` reads it."""
        return dict(encode(self, leave_out=("name",)))

    def format_of(self, weight: QuantizableWeight) -> WeightFormat | None:
        """The format of a weight; None where it stays as it is."""
        name = self._name_of(weight)
        if name == KEEP:
            return None
        return stored_format(
            name,
            weight.columns,
            stacked=weight.kind == Role.ROUTED_EXPERT.value,
            rounded_input=self.quantizes_input_of(weight),
            group=self.group,
        )

    def quantizes_input_of(self, weight: QuantizableWeight) -> bool:
        """Whether the product with that weight reads quantized values on both sides."""
        name = self._name_of(weight)
        if weight.kind not in self.activations or name == KEEP:
            return False
        return FORMATS[name].dtype in ACTIVATIONS

    def _name_of(self, weight: QuantizableWeight) -> str:
        name = self.weights.get(weight.kind, KEEP)
        for override in self.exceptions:
            if override.matches(weight):
                name = override.format
        return name

    def only(self, kinds: Iterable[str]) -> Recipe:
        """The part of it that concerns some kinds."""
        chosen = tuple(kinds)
        return replace(
            self,
            weights={k: v for k, v in self.weights.items() if k in chosen},
            activations=tuple(k for k in self.activations if k in chosen),
        )

    def check(self, weights: Sequence[QuantizableWeight]) -> None:
        """Refuses (RecipeError) a group that does not divide a row, or a recipe without effect."""
        formats = [self.format_of(weight) for weight in weights]
        if not any(formats):
            named = ", ".join(self.weights) or "no kind"
            kinds = ", ".join(sorted({weight.kind for weight in weights}))
            raise RecipeError(
                f"recipe {self.name!r} changes nothing of this model",
                found=f"it names {named}; the model has {kinds}",
                do="choose a recipe that names a kind the model has",
            )
        for weight, how in zip(weights, formats, strict=True):
            columns = weight.columns
            if how is None or not how.group or columns % how.group == 0:
                continue
            fitting = [g for g in GROUPS if columns % g == 0] if how.name == "int4" else []
            allowed = ", ".join(map(str, fitting)) or "none"
            do = f"store {weight.kind} in another format, int8 for instance"
            raise RecipeError(
                f"{weight.name} cannot be divided into groups of {how.group}",
                found=f"its rows have {columns} weights; allowed groups: {allowed}",
                do="choose another --group" if fitting else do,
            )


def builtin_recipes() -> dict[str, Recipe]:
    """The recipes that come along, by name."""
    file = resources.files("twotower.calibration") / "data" / "recipes.toml"
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: Recipe.from_mapping(name, table) for name, table in tables.items()}


def load_recipe(wanted: str) -> Recipe:
    """A recipe by name, or of a TOML file: `mine.toml`, or `mine.toml:name` if that has several."""
    known = builtin_recipes()
    if wanted in known:
        return known[wanted]
    path, _, name = wanted.partition(".toml:")
    if not (name or wanted.endswith(".toml")):
        raise RecipeError(
            f"there is no recipe {wanted!r}",
            found=f"recipes: {', '.join(known)}, auto",
            do="choose one of them, or name a .toml file with your own",
        )
    file = Path(f"{path}.toml" if name else wanted)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise RecipeError(
            f"cannot read the recipe file {file}",
            found=str(e),
            do="name a TOML file with a table a recipe",
        ) from e
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    chosen = name or (next(iter(tables)) if len(tables) == 1 else "")
    if chosen not in tables:
        raise RecipeError(
            f"{file} has no recipe {chosen!r}",
            found=f"tables: {', '.join(tables) or 'none'}",
            do=f"name one of them: --recipe {file}:NAME",
        )
    return Recipe.from_mapping(chosen, tables[chosen])


def quantizable_weights(config: ModelConfig, graph: str) -> list[QuantizableWeight]:
    """The weights of a float graph that recipes are about: embeddings and matrices of products."""
    tower = "denoiser" if graph == DENOISER else "context"
    return [
        QuantizableWeight(
            weight.name,
            tower,
            weight.layer,
            weight.role.value,
            weight.shape[-1],
        )
        for weight in declared_weights(config, graph, config.dtype)
        if weight.quantizable
    ]


def _require(value: Any, allowed: Iterable[Any], what: str) -> None:
    choices = list(allowed)
    if value not in choices:
        raise RecipeError(
            what,
            found=f"{value!r}; allowed: {', '.join(map(str, choices))}",
            do="correct the recipe (docs/quantization.md has the form)",
        )
