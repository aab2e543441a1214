"""Weights by arithmetic are the weights the graphs declare and the checkpoints hold."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors import safe_open

from twotower.builders.segment import layer_bytes
from twotower.builders.weight_inputs import place_weights
from twotower.calibration.recipes import Recipe, builtin_recipes, parts_of
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.formats import FORMATS, stored_format
from twotower.config.model import ModelConfig, parse_model_config, read_model_config
from twotower.export.graph_files import save_program
from twotower.export.graphs.precision import Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.planning.weights import EXPERT_FORMATS, checkpoint_bytes, graph_weights
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER
from twotower.weights.declared import lay_out
from twotower.weights.external import load_graph

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "a": ROOT / "tests/fixtures/hybrid-a",
    "b": ROOT / "tests/fixtures/hybrid-b",
    "tiny": ROOT / "assets/twotower-tiny",
}


def config_of(name: str) -> ModelConfig:
    return (
        parse_model_config(PUBLISHED_CONFIG, "published")
        if name == "published"
        else read_model_config(FOLDERS[name] / "config.json")
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", [*FOLDERS, "published"])
def test_every_graph_declares_what_the_arithmetic_says(name: str, dtype: str) -> None:
    config = config_of(name)
    for graph, planned in graph_weights(config, dtype).items():
        declared = build_graph(graph, config, dtype).weights
        assert planned.total == sum(w.nbytes for w in declared)
        assert planned.stored == sum(
            -(-w.nbytes // step) * step
            for w in declared
            for step in [4096 if w.nbytes >= 1 << 20 else 64]
        )
        in_layers = [w for w in declared if ".layers." in w.name or "scale_shift" in w.name]
        assert sum(planned.layers) == sum(w.nbytes for w in in_layers)
        assert sum(planned.by_kind.values()) == sum(planned.by_dtype.values()) == planned.total


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_holds_what_the_arithmetic_says(name: str) -> None:
    elements = 0
    for shard in FOLDERS[name].glob("model*.safetensors"):
        with safe_open(shard, "numpy") as file:
            elements += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    config = config_of(name)
    item = 4 if config.dtype == "float32" else 2
    assert checkpoint_bytes(config) == elements * item
    planned = graph_weights(config, "float32")
    assert sum(w.total for w in planned.values()) == 4 * elements


def test_the_published_model_is_as_large_as_published() -> None:
    size = checkpoint_bytes(config_of("published"))
    assert round(size / 2 / 1e9, 1) == 63.2
    assert round(size / 2**30, 1) == 117.7


@pytest.mark.parametrize("name", EXPERT_FORMATS)
def test_few_bits_narrow_routed_experts_only(name: str) -> None:
    config = config_of("published")
    before, after = (
        graph_weights(config, "bfloat16")[CONTEXT],
        graph_weights(config, "bfloat16", (("routed_expert", name),))[CONTEXT],
    )
    rest = {kind: size for kind, size in before.by_kind.items() if kind != "routed_expert"}
    assert rest == {kind: size for kind, size in after.by_kind.items() if kind != "routed_expert"}
    bits = 8 * 2 * after.by_kind["routed_expert"] / before.by_kind["routed_expert"]
    assert FORMATS[name].bits < bits <= FORMATS[name].bits + 0.51
    assert after.by_dtype[name] == after.by_kind["routed_expert"]


@pytest.mark.parametrize("recipe", builtin_recipes().values(), ids=lambda r: r.name)
@pytest.mark.parametrize("name", ["a", "tiny", "published"])
def test_the_arithmetic_of_a_recipe_is_what_its_graphs_declare(name: str, recipe: Recipe) -> None:
    config = config_of(name)
    formats = tuple(sorted(recipe.weights.items()))
    for graph, planned in graph_weights(
        config, "bfloat16", formats, tuple(recipe.activations)
    ).items():
        float_weights = build_graph(graph, config, "bfloat16").weights
        few = {
            part.name: how
            for part in parts_of(config, float_weights)
            if (how := recipe.format_of(part))
        }
        declared = build_graph(graph, config, "bfloat16", Precision(few)).weights
        global_scales = sum(w.nbytes for w in declared if w.part == "global_scale")
        assert planned.total == sum(w.nbytes for w in declared) - global_scales
        assert global_scales <= 2 * len(declared)


@pytest.mark.parametrize("recipe", ["float", *builtin_recipes()])
@pytest.mark.parametrize("name", ["a", "tiny"])
def test_what_engines_hold_is_what_the_builder_leaves_inside(
    tmp_path: Path, name: str, recipe: str
) -> None:
    config, chosen = config_of(name), builtin_recipes().get(recipe) or Recipe(name="float")
    formats = tuple(sorted(chosen.weights.items()))
    for graph, planned in graph_weights(
        config, "bfloat16", formats, tuple(chosen.activations)
    ).items():
        float_weights = build_graph(graph, config, "bfloat16").weights
        few = {
            part.name: how
            for part in parts_of(config, float_weights)
            if (how := chosen.format_of(part))
        }
        made = build_graph(graph, config, "bfloat16", Precision(few))
        save_program(tmp_path / "model.onnx", made, lay_out(made.weights))
        model = load_graph(tmp_path / "model.onnx")
        places = place_weights(model, "inputs")
        held = layer_bytes(model)
        constants = held.total - places.inside_bytes  # of the graph itself: small, and no weights
        scales = sum(w.nbytes for w in made.weights if w.part == "global_scale")
        assert planned.held.total + scales == places.inside_bytes
        assert planned.held.largest_packed == held.largest_packed == places.largest_packed
        assert (planned.held.largest_packed > 0) == (
            "4" in recipe or recipe == "mixed"
        ) or graph == CONTEXT_HEAD
        assert 0 <= constants < 40_000
        assert all(
            0 <= b - a < constants + scales + 1
            for a, b in zip(planned.held.layers, held.layers, strict=True)
        )
        assert planned.packed == sum(
            planned.by_dtype.get(few_bits, 0) for few_bits in ("int4", "nvfp4")
        )


def test_stacked_experts_in_8_bits_have_groups_that_divide_their_rows() -> None:
    assert stored_format("int8", 1856, stacked=True).group == 64
    assert stored_format("int8", 2688, stacked=True).group == 64
    assert stored_format("int8", 96, stacked=True).group == 0, "a short row is a group"
    assert stored_format("int8", 2688, stacked=False).group == 0
    assert stored_format("int8", 2688, stacked=True, rounded_input=True).group == 0, (
        "TensorRT for RTX builds no such product of blocks"
    )
    assert (
        stored_format("int4", 1856, stacked=True).nbytes((3, 1856), "bfloat16")
        == 3 * 928 + 3 * 58 * 2
    )
    assert (
        stored_format("nvfp4", 1856, stacked=True).nbytes((3, 1856), "bfloat16")
        == 3 * 928 + 3 * 116
    )


def test_the_conditioning_is_the_denoiser_s() -> None:
    planned = graph_weights(config_of("a"), "float32")
    assert "conditioning" in planned[DENOISER].by_kind
    assert "conditioning" not in planned[CONTEXT].by_kind
