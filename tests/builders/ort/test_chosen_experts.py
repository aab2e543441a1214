"""Only the chosen experts compute, with the exported graph's numbers; a row's are its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.helpers.bundles import built_fixture
from tests.helpers.errors import fails
from tests.helpers.graphs import FIXTURES
from tests.helpers.moe_layer import PREFIX, recorded_moe
from tests.helpers.quantized import TINY
from tools.cpu_experts import form
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.ort.cpu import engine_places, write_engine
from twotower.bundle import Bundle, load_engine_record
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.config import ModelConfig, read_model_config
from twotower.config.formats import stored_format
from twotower.errors import ConfigError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.export.graphs.precision import Precision
from twotower.onnx_runtime import ort, session_options
from twotower.runtime import GenerationConfig, TwoTower
from twotower.weights.mapped import read_weight
from twotower.weights.refs import WeightRef

Array = np.ndarray[Any, Any]
Layer = Callable[[Array], Array]
WIDTH, FEATURES = 768, 256


def config_of(experts: int = 16, top: int = 3) -> ModelConfig:
    return replace(
        read_model_config(FIXTURES / "hybrid-a" / "config.json"),
        dtype="float32",
        hidden_size=WIDTH,
        moe_intermediate_size=FEATURES,
        moe_shared_expert_intermediate_size=2 * FEATURES,
        n_routed_experts=experts,
        num_experts_per_tok=top,
    )


def layer(
    folder: Path, config: ModelConfig, dialect: str, *, packed: bool = True, **changed: Array
) -> Layer:
    """A mixture of experts alone as an engine has it, on random weights."""
    random = np.random.default_rng(0)

    def value_of(name: str, ref: WeightRef) -> Array:
        value = random.standard_normal(ref.shape, dtype=np.float32)
        parts = name.removeprefix(PREFIX).split(".")
        scaled = value / np.sqrt(ref.shape[-1], dtype=np.float32)
        return changed.get(parts[1] if parts[1] != "weight" else parts[0], scaled)

    recorded, refs = recorded_moe(folder, config, value_of)
    top = None if dialect == "standard" else config.num_experts_per_tok
    located = {name: ("data", ref) for name, ref in refs.items()}
    write_engine(
        ir.to_proto(recorded), located, folder / "moe.onnx", name="moe", top=top, packed=packed
    )
    options = session_options(folder, threads=2)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        (folder / "moe.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def run(values: Array) -> Array:
        return np.asarray(session.run(None, {"x": values})[0])

    return run


def tokens(rows: int, length: int) -> Array:
    return np.random.default_rng(7).standard_normal((rows, length, WIDTH), dtype=np.float32)


both_ways = pytest.mark.parametrize(
    "packed", [True, False], ids=["experts packed", "experts where they are"]
)


@pytest.mark.slow
@both_ways
@pytest.mark.parametrize(("experts", "top"), [(16, 3), (16, 1), (4, 4), (64, 6)])
def test_it_is_the_exported_graph(tmp_path: Path, packed: bool, experts: int, top: int) -> None:
    """But for the order of sums, which sizes and threads decide."""
    config = config_of(experts, top)
    sizes = (1, 1), (1, 2), (1, 16), (3, 16), (2, 200)
    compare_dialects(tmp_path, config, *sizes, packed=packed)


def compare_dialects(
    folder: Path, config: ModelConfig, *sizes: tuple[int, int], **changed: Any
) -> None:
    chosen, standard = (layer(folder, config, kind, **changed) for kind in ("chosen", "standard"))
    for size in sizes:
        want = standard(tokens(*size))
        limit = 4e-6 * float(abs(want).max())
        np.testing.assert_allclose(chosen(tokens(*size)), want, 0, limit, err_msg=str(size))


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "best"), [(1, 1), (4, 2)])
def test_of_equal_scores_the_first_are_chosen(tmp_path: Path, groups: int, best: int) -> None:
    """TopK and comparing pairs agree where a router cannot decide, and on open groups."""
    config = replace(config_of(), n_group=groups, topk_group=best)
    gate = np.random.default_rng(9).standard_normal(
        (config.n_routed_experts, WIDTH), dtype=np.float32
    )
    gate[1::2] = gate[::2]  # pairs of experts that score alike for every token
    for changed in ({"gate": gate}, {"gate": np.zeros_like(gate)}):
        compare_dialects(tmp_path, config, (3, 16), **changed)


def check_rows(run: Layer, length: int) -> None:
    """A row has its own numbers beside any others, at any place."""
    x = tokens(32, length)
    alone = np.concatenate([run(row[None]) for row in x])
    for rows in (2, 3, 8, 32):
        assert np.array_equal(run(x[:rows]), alone[:rows]), rows
    order = np.random.default_rng(1).permutation(32)
    assert np.array_equal(run(x[order]), alone[order])


@both_ways
@pytest.mark.parametrize("length", [1, 16])
def test_a_row_s_numbers_are_its_own(tmp_path: Path, packed: bool, length: int) -> None:
    run = layer(tmp_path, config_of(), "chosen", packed=packed)
    check_rows(run, length)


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_skewed_choices(tmp_path: Path, bias: float) -> None:
    """All tokens choose one expert, or nobody does; then nothing of it reaches a result."""
    config = config_of()
    lean = np.zeros((config.n_routed_experts, 1), np.float32)
    lean[5] = bias
    random = np.random.default_rng(3)
    up = random.standard_normal((config.n_routed_experts, FEATURES, WIDTH), dtype=np.float32)
    if bias < 0:
        up[5] = np.inf
    changed = {"e_score_correction_bias": lean, "up_proj": up}
    run = layer(tmp_path, replace(config, n_shared_experts=0), "chosen", **changed)
    x = tokens(4, 16)
    assert np.isfinite(run(x)).all()
    assert np.array_equal(run(x)[2:3], run(x[2:3]))


def test_a_row_that_is_not_a_number_harms_no_other(tmp_path: Path) -> None:
    run = layer(tmp_path, config_of(), "chosen")
    x = tokens(3, 16)
    want = run(x)
    x[1] = np.nan
    got = run(x)
    assert np.isnan(got[1]).all()
    assert np.array_equal(got[[0, 2]], want[[0, 2]])


def test_weights_stay_where_they_are_and_keep_their_names(tmp_path: Path) -> None:
    """An expert is a part of the bundle's own weight; who composes engines finds the whole."""
    for dtype in ("float32", "bfloat16"):
        bundle = built_fixture("hybrid-a", tmp_path / dtype, dtype)
        for name in ("context", "denoiser"):
            places = engine_places(bundle, name)
            weights = bundle.weights(name)
            assert set(places) == set(weights)
            for weight, (file, ref) in places.items():
                assert ref.shape == weights[weight].shape, weight
                held = np.memmap(bundle.path / file, np.uint8, "r")
                data = np.memmap(bundle.path / f"{name}/model.onnx.data", np.uint8, "r")
                assert np.array_equal(read_weight(held, ref), read_weight(data, weights[weight])), (
                    weight
                )
    record = load_engine_record(Bundle.open(tmp_path / "float32"), "ort-cpu")
    operators = record.report["operators"]["denoiser"]
    assert operators["Split"] > 0 and "If" not in operators


def texts(bundle: Bundle, mode: str) -> list[list[int]]:
    config = GenerationConfig(mode=mode, max_new_tokens=24, ignore_eos=True)
    with TwoTower.open(bundle.path, target="ort-cpu") as model:
        return [result.tokens for result in model.generate([[5, 6, 7], [8, 9, 10, 11, 12]], config)]


@pytest.mark.parametrize("length", [1, 15, 16])
@pytest.mark.parametrize(
    ("name", "group"), [("int4", 32), ("int4", 64), ("int4", 128), ("int8", 0)]
)
def test_a_row_s_numbers_are_its_own_in_few_bits(
    tmp_path: Path, name: str, group: int, length: int
) -> None:
    """An expert of an odd number of rows computes one more where its products ask for it."""
    config = replace(config_of(), n_shared_experts=0)
    few = {
        f"{PREFIX}experts.{part}_proj.weight": stored_format(name, WIDTH, stacked=True, group=group)
        for part in ("up", "down")
    }
    run = form(tmp_path, config, Precision(weights=few), chosen=True)
    check_rows(run, length)


@pytest.mark.trained
@pytest.mark.parametrize("recipe", [None, "nvfp4-experts"])
def test_the_text_is_that_of_the_exported_graph(tmp_path: Path, recipe: str | None) -> None:
    """A branch expands its own expert only. Integers also round inputs: test_quantize.py."""
    bundle = export_bundle(
        Checkpoint.open(TINY), tmp_path / "float", ExportConfig(dtype="bfloat16")
    )
    if recipe is not None:
        plan = plan_quantization(bundle, builtin_recipes()[recipe])
        bundle = quantize_bundle(bundle, plan, tmp_path / recipe)
    said = {}
    for dialect in ("chosen", "standard"):
        build_engines(
            bundle, "ort-cpu", builder_for("ort-cpu"), config=BuildConfig(dialect=dialect)
        )
        record = load_engine_record(bundle, "ort-cpu")
        assert record.report["dialect"] == dialect, "another dialect is another engine"
        assert ("ScatterElements" in record.report["operators"]["context"]) == (dialect == "chosen")
        said[dialect] = [texts(bundle, mode) for mode in ("diffusion", "ar")]
    assert said["chosen"] == said["standard"]


def test_an_unknown_dialect() -> None:
    with fails(ConfigError, "--dialect cannot be 'fast'", found="chosen, standard"):
        BuildConfig(dialect="fast")
