"""Planned weights are those a checkpoint holds, a bundle stores and an engine keeps inside."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.helpers.published import PUBLISHED, RECIPES, saved_graph
from tests.helpers.source import CHECKPOINTS
from twotower.builders.segment import layer_bytes
from twotower.builders.weight_inputs import place_weights
from twotower.config.formats import FORMATS, stored_format
from twotower.config.model import ModelConfig, read_model_config
from twotower.planning.weights import EXPERT_FORMATS, checkpoint_bytes, graph_weights
from twotower.spec import CONTEXT, CONTEXT_HEAD
from twotower.weights.external import weight_refs


def config_of(name: str) -> ModelConfig:
    if name == "published":
        return PUBLISHED
    return read_model_config(CHECKPOINTS[name] / "config.json")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_holds_what_the_arithmetic_says(name: str) -> None:
    elements = 0
    for shard in CHECKPOINTS[name].glob("model*.safetensors"):
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
        graph_weights(config, "bfloat16", few)[CONTEXT] for few in ((), (("routed_expert", name),))
    )
    rest = {kind: size for kind, size in before.by_kind.items() if kind != "routed_expert"}
    assert rest == {kind: size for kind, size in after.by_kind.items() if kind != "routed_expert"}
    bits = 8 * 2 * after.by_kind["routed_expert"] / before.by_kind["routed_expert"]
    assert FORMATS[name].bits < bits <= FORMATS[name].bits + 0.51
    assert after.by_dtype[name] == after.by_kind["routed_expert"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["a", "tiny"])
def test_what_engines_hold_is_what_the_builder_leaves_inside(
    tmp_path: Path, name: str, recipe: str
) -> None:
    config, chosen = config_of(name), RECIPES[recipe]
    formats = tuple(sorted(chosen.weights.items()))
    rounded = tuple(chosen.activations)
    for graph, planned in graph_weights(config, "bfloat16", formats, rounded).items():
        model = saved_graph(tmp_path / "model.onnx", config, graph, recipe)
        refs = weight_refs(model).values()
        assert planned.total == sum(ref.nbytes for ref in refs)
        assert planned.stored == max(ref.end for ref in refs)
        places = place_weights(model, "inputs")
        held = layer_bytes(model)
        constants = held.total - places.inside_bytes  # of the graph itself: small, and no weights
        assert planned.held.total == places.inside_bytes
        assert planned.held.largest_packed == held.largest_packed == places.largest_packed
        in_4_bits = "4" in recipe or recipe == "mixed"
        assert (planned.held.largest_packed > 0) == in_4_bits or graph == CONTEXT_HEAD
        assert 0 <= constants < 40_000
        for mine, theirs in zip(planned.held.layers, held.layers, strict=True):
            assert 0 <= theirs - mine <= constants
        assert planned.packed == sum(planned.by_dtype.get(name, 0) for name in ("int4", "nvfp4"))


def test_stacked_experts_have_groups_that_divide_their_rows() -> None:
    def group(columns: int, **how: bool) -> int:
        return stored_format("int8", columns, **{"stacked": True, **how}).group

    assert group(1856) == group(2688) == 64
    assert group(96) == 0, "a short row is a group"
    assert group(2688, stacked=False) == 0
    assert group(2688, rounded_input=True) == 0, "TensorRT for RTX builds no such product of blocks"
    for name, scales in (("int4", 3 * 58 * 2), ("nvfp4", 3 * 116)):
        stored = stored_format(name, 1856, stacked=True).nbytes((3, 1856), "bfloat16")
        assert stored == 3 * 928 + scales
