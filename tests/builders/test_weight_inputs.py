"""Which weights become inputs, which must stay inside, and that nothing else of a graph changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.helpers.graph_runs import random_inputs, run_graph
from tests.helpers.quantized import TINY
from tests.helpers.trt.install import bundle_with_engines
from twotower.builders.weight_inputs import place_weights
from twotower.bundle import GRAPH_FILES, Bundle, EngineRecord, load_engine_record
from twotower.calibration import load_recipe
from twotower.calibration.recipes import quantizable_weights
from twotower.checkpoint.synthetic import published_slice, write_checkpoint
from twotower.config import read_model_config
from twotower.config.formats import FORMATS
from twotower.export import Checkpoint, export_bundle
from twotower.export.graph_files import save_program
from twotower.export.graphs.precision import Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.spec import DENOISER
from twotower.weights.declared import lay_out
from twotower.weights.external import load_graph, weight_refs
from twotower.weights.mapped import read_weight


def test_every_weight_of_a_float_graph_is_an_input(hybrid_a: Bundle) -> None:
    for name in GRAPH_FILES:
        model = load_graph(hybrid_a.graph_file(name))
        before = weight_refs(model)
        places = place_weights(model, "inputs")
        assert places.inside == {}
        assert places.inside_bytes == 0
        assert {s.name: (s.dtype, s.axes) for s in places.inputs} == {
            n: (r.dtype, r.shape) for n, r in before.items()
        }
        assert places.input_bytes == sum(r.nbytes for r in before.values())
        assert not weight_refs(model)
        onnx.checker.check_model(model)


def test_all_stay_inside_where_that_is_asked_for(hybrid_a: Bundle) -> None:
    model = load_graph(hybrid_a.graph_file(DENOISER))
    before = weight_refs(model)
    places = place_weights(model, "inside")
    assert places.inputs == ()
    assert set(places.inside) == set(before)
    assert weight_refs(model) == before


@pytest.mark.parametrize("recipe", ["int4-experts", "int8-weights", "nvfp4-experts"])
def test_weights_in_few_bits_stay_inside_with_their_scales(tmp_path: Path, recipe: str) -> None:
    config = read_model_config(TINY / "config.json")
    named = load_recipe(recipe)
    parts = quantizable_weights(config, DENOISER)
    precision = Precision({p.name: how for p in parts if (how := named.format_of(p))})
    graph = build_graph(DENOISER, config, "float32", precision)
    save_program(tmp_path / "model.onnx", graph, lay_out(graph.weights))
    model = load_graph(tmp_path / "model.onnx")
    refs = weight_refs(model)
    places = place_weights(model, "inputs")
    types = {how.dtype for how in FORMATS.values()}
    packed = {name for name, ref in refs.items() if ref.dtype in types}
    assert packed
    assert packed < set(places.inside)
    scales = set(places.inside) - packed
    assert all(name.endswith((".scale", ".global_scale")) for name in scales)
    every = {name for name in refs if name.endswith((".scale", ".global_scale"))}
    assert every <= set(places.inside)
    assert all(places.inside.values()), "each has its reason"
    assert {s.dtype for s in places.inputs} == {"float32"}


LEVELS = {
    "plain": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimised": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", GRAPH_FILES)
@pytest.mark.parametrize("which", ["hybrid_a", pytest.param("wide", marks=pytest.mark.slow)])
def test_weights_fed_compute_what_weights_inside_compute(
    request: pytest.FixtureRequest, which: str, name: str, level: str
) -> None:
    """To the bit: the product's kernels must not know where a weight comes from.

    At 768 wide ONNX Runtime packs constant weights, and then sums in another order: packing is off.
    """
    bundle: Bundle = request.getfixturevalue(which)
    file = bundle.graph_file(name)
    given = random_inputs(bundle.signatures[name].inputs, bundle.config.vocab_size)
    options: Any = {"level": LEVELS[level], "packed": which != "wide"}
    inside = run_graph(load_graph(file), file.parent, given, **options)
    model, data = load_graph(file), np.memmap(bundle.data_file(name), dtype=np.uint8, mode="r")
    place_weights(model, "inputs")
    refs = bundle.weights(name).items()
    given |= {weight: np.ascontiguousarray(read_weight(data, ref)) for weight, ref in refs}
    fed = run_graph(model, file.parent, given, **options)
    for output, value in inside.items():
        np.testing.assert_array_equal(fed[output], value)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("wide")
    slim: dict[str, Any] = {"hidden_size": 768, "vocab_size": 512, "torch_dtype": "float32"}
    slim |= {"n_routed_experts": 4, "num_experts_per_tok": 2}
    checkpoint = write_checkpoint(folder / "checkpoint", {**published_slice("M*E"), **slim})
    return export_bundle(Checkpoint.open(checkpoint), folder / "bundle")


def test_build_json_says_what_is_read_and_what_is_held(tmp_path: Path) -> None:
    def engines(record: EngineRecord) -> dict[str, Any]:
        return {part.file: part for parts in record.engines.values() for part in parts}

    bundle = bundle_with_engines("hybrid-b", tmp_path / "b")
    record = load_engine_record(bundle, "rtx")
    for name, graph in (("context", "context.engine"), ("denoiser", "denoiser.engine")):
        assert {w.name for w in engines(record)[graph].weights} == set(bundle.weights(name))
        assert record.report["engines"][graph]["weights"]["inside"] == {}
    other = bundle_with_engines("hybrid-b", tmp_path / "c", weights="inside")
    held = load_engine_record(other, "rtx")
    assert set(engines(held)["denoiser.engine"].constants) == set(bundle.weights("denoiser"))
    assert set(held.holds) == set(GRAPH_FILES)
