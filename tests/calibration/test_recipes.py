"""Recipes: those that come along, one's own, and what is wrong with the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.errors import fails
from twotower.calibration.recipes import (
    QuantizableWeight,
    Recipe,
    RecipeOverride,
    builtin_recipes,
    load_recipe,
    quantizable_weights,
)
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, published_slice
from twotower.config.model import parse_model_config
from twotower.errors import RecipeError
from twotower.weights.declared import declared_weights

MAMBA = ("conv1d", "dt_bias", "A_log", ".D")
ALWAYS_HIGH = (*MAMBA, "gate.", "norm", "t_embedder", "t_block", "scale_shift_tables")


def test_the_recipes_that_come_along() -> None:
    in_8_bits = {"int8-weights", "int8", "fp8"}
    assert set(builtin_recipes()) == in_8_bits | {"int4-experts", "nvfp4-experts", "mixed"}
    assert all(recipe.summary for recipe in builtin_recipes().values())


@pytest.mark.parametrize("recipe", builtin_recipes().values(), ids=lambda r: r.name)
def test_a_recipe_fits_the_published_model_and_leaves_high_what_must_be(recipe: Recipe) -> None:
    config = parse_model_config(PUBLISHED_CONFIG, "published")
    for graph in ("context", "context_head", "denoiser"):
        parts = quantizable_weights(config, graph)
        few = {p.name for p in parts if recipe.format_of(p)}
        assert not [name for name in few if any(part in name for part in ALWAYS_HIGH)]
        if graph != "context_head":
            recipe.check(parts)
            named = {w.name for w in declared_weights(config, graph, "bfloat16")} - {
                p.name for p in parts
            }
            assert all(any(part in name for part in ALWAYS_HIGH) for name in named), (
                "every matrix of a product can be quantized"
            )


def test_a_recipe_survives_being_stored() -> None:
    recipe = Recipe(
        name="mine",
        weights={"mamba": "int8", "routed_expert": "int4"},
        activations=("mamba",),
        group=64,
        exceptions=(
            RecipeOverride(tower="denoiser", layer=3, format="keep"),
            RecipeOverride(kind="mamba", layer=0, format="int4"),
        ),
    )
    assert Recipe.from_mapping("mine", recipe.to_json()) == recipe


def test_the_last_exception_that_matches_decides() -> None:
    part = QuantizableWeight("x", "denoiser", 3, "mamba", 128)
    base = {"name": "r", "weights": {"mamba": "int8"}}
    assert Recipe(**base).format_of(part).name == "int8"  # type: ignore[union-attr, arg-type]
    both = (RecipeOverride(layer=3), RecipeOverride(tower="denoiser", format="int4"))
    assert Recipe(**base, exceptions=both).format_of(part).name == "int4"  # type: ignore[union-attr, arg-type]
    assert Recipe(**base, exceptions=both[::-1]).format_of(part) is None  # type: ignore[arg-type]


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[a]\nweights = { head = "int8" }\n[b]\nweights = { mamba = "int4" }\ngroup = 64\n'
    )
    assert load_recipe(f"{file}:b").group == 64
    with pytest.raises(RecipeError, match="has no recipe"):
        load_recipe(str(file))
    file.write_text('[a]\nweights = { head = "int8" }\n')
    assert load_recipe(str(file)).weights == {"head": "int8"}


HEAD = '[a]\nweights = { head = "int8" }\n'


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ('[a]\nweights = { router = "int8" }', "a layer kind there is not", "routed_expert"),
        ('[a]\nweights = { head = "int3" }', "opset 24", "nvfp4"),
        ('[a]\nweights = { head = "mxfp8" }', "opset 24", "fp8"),
        ('[a]\nactivations = ["mamba"]', "the inputs of mamba", "int8, fp8"),
        ('[a]\nweights = { mamba = "int4" }\nactivations = ["mamba"]', "inputs of mamba", "int4"),
        (HEAD + "group = 48", "the kernels of experts do not take", "48"),
        ('[a]\nbits = 4', "is not written like one", "bits: unknown key; known: summary, weights"),
        (HEAD + 'except = [{ tower = "third" }]', "a tower there is not", "denoiser"),
        (HEAD + "except = [{ row = 1 }]", "is not written like one", "row"),
        ('[a]\nweights = 8', "is not written like one", "weights: 8, expected an object"),
        ("[a", "cannot read the recipe file", "Expected"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, text: str, what: str, found: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with fails(RecipeError, what=what, found=found) as caught:
        load_recipe(str(file))
    assert caught.value.do


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with fails(RecipeError, "there is no recipe 'int5'", found="int4-experts"):
        load_recipe("int5")
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(str(tmp_path / "none.toml"))


def test_what_a_model_s_shapes_do_not_allow() -> None:
    config = parse_model_config({**published_slice("E*"), "moe_intermediate_size": 1864}, "odd")
    parts = quantizable_weights(config, "context")
    with fails(RecipeError, "cannot be divided into groups of 32", found="1864"):
        builtin_recipes()["int4-experts"].check(parts)
    dense = parse_model_config(published_slice("M*"), "dense")
    with pytest.raises(RecipeError, match="changes nothing"):
        builtin_recipes()["int4-experts"].check(quantizable_weights(dense, "context"))
