"""Plans against what is really built, and their promises to other modules."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.errors import fails
from tests.helpers.published import PUBLISHED
from tests.helpers.quantized import TINY as TINY_CHECKPOINT
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.base import DIALECTS, STANDARD
from twotower.builders.build_cost import build_memory
from twotower.builders.trt.cut import even_layers
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.config.model import read_model_config
from twotower.errors import BuildError, ConfigError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.planning import PlanOptions, plan_bundle
from twotower.weights.refs import PAGE

ROOT = Path(__file__).parents[2]
TINY = read_model_config(ROOT / "assets/twotower-tiny/config.json")
WHOLE = ["context.engine", "context_head.engine", "denoiser.engine"]
DENSE = PlanOptions(target="rtx", expert_path="dense")


def test_engines_are_programs_whatever_the_model() -> None:
    plan = plan_bundle(PUBLISHED, DENSE)
    assert [e.name for e in plan.engines] == WHOLE
    assert all(e.held_bytes == 0 and e.weight_bytes > 5e8 for e in plan.engines)
    assert plan.build_peak == build_memory(0, 52) < 1.5e9
    assert sum(e.engine_bytes for e in plan.engines) == plan.disk.engines["rtx"] < 1e8
    assert 30 < (plan.build_seconds or 0) < 240
    none = dict.fromkeys(("rtx", "trt", "ort-cuda"), 0)
    assert plan.disk.copies == {**none, "ort-cpu": plan.disk.engines["ort-cpu"]}


def test_weights_in_few_bits_are_counted_where_they_lie_twice() -> None:
    plan = plan_bundle(PUBLISHED, replace(DENSE, experts="int4"))
    experts = {name: w.by_kind.get("routed_expert", 0) for name, w in plan.weights.items()}
    assert {e.graph: e.held_bytes for e in plan.engines} == experts
    assert plan.held == plan.disk.copies["rtx"] == sum(experts.values()) > 30e9
    assert plan.disk.engines["rtx"] - plan.disk.copies["rtx"] < 1e8
    assert 3 * 16e9 < plan.build_peak < 4 * 17e9
    assert (plan.build_seconds or 0) > 600


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_a_memory_bound_cuts_what_holds_weights(experts: str) -> None:
    bound = 16 * 10**9
    options = PlanOptions(target="trt", experts=experts, expert_path="dense")
    whole = plan_bundle(PUBLISHED, options)
    cut = plan_bundle(PUBLISHED, replace(options, max_build_memory=bound))
    assert len(cut.engines) > 8
    assert all((e.build_peak_bytes or 0) <= bound for e in cut.engines)
    assert sum(e.weight_bytes for e in cut.engines) == sum(e.weight_bytes for e in whole.engines)
    assert sum(e.held_bytes for e in cut.engines) == whole.held
    for graph in ("context", "denoiser"):
        layers = [e.layers for e in cut.engines if e.graph == graph]
        assert layers[0][0] == 0
        assert layers[-1][1] == 52
        assert all(a[1] == b[0] for a, b in pairwise(layers))
    assert len(plan_bundle(PUBLISHED, replace(DENSE, max_build_memory=bound)).engines) == 3, (
        "programs are not cut"
    )


def test_several_devices_take_the_engines_that_build_makes_of_segments() -> None:
    plan = plan_bundle(PUBLISHED, replace(DENSE, devices=4))
    names = ("context.0", "context.1", "context_head", "denoiser.0", "denoiser.1")
    assert [e.name for e in plan.engines] == [f"{name}.engine" for name in names]
    assert [e.layers for e in plan.engines if e.graph == "denoiser"] == list(
        even_layers(plan.weights["denoiser"].layers, 2)
    )


def test_a_bound_below_one_layer_is_refused() -> None:
    with fails(BuildError, do="--max-build-memory"):
        plan_bundle(PUBLISHED, replace(DENSE, experts="int4", max_build_memory=10**9))
    with fails(BuildError, found="programs between experts are cut no further"):
        plan_bundle(PUBLISHED, PlanOptions(max_build_memory=10**8))


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_onnx_runtime_compiles_nothing(target: str) -> None:
    plan = plan_bundle(PUBLISHED, PlanOptions(target=target))
    assert (plan.build_peak, plan.build_seconds) == (0, None)
    assert plan.dtype == ("float32" if target == "ort-cpu" else "bfloat16")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (PlanOptions(sms=(90,)), "not Hopper (90)"),
        (PlanOptions(sms=(75,)), "float16 only"),
        (PlanOptions(target="trt", sms=(89,)), "GPU at hand"),
        (PlanOptions(experts="int4", formats=(("head", "int8"),)), "head int8"),
        (PlanOptions(max_context=10**6), "1 to 262144"),
        (PlanOptions(target="ort-cuda", expert_path="kernels", max_batch=17), "at most 4096"),
        (PlanOptions(target="rtx", expert_path="fused"), "ort-cuda"),
        (PlanOptions(target="ort-cuda", expert_path="fused", experts="nvfp4"), "nvfp4"),
        (PlanOptions(target="ort-cpu", expert_path="kernels"), "run on GPUs"),
        (PlanOptions(expert_path="kernels", max_batch=17), "at most 4096"),
        (PlanOptions(expert_path="kernels", dtype="float16", sms=(75, 86)), "SM 75"),
    ],
)
def test_what_no_build_could_do_is_refused(options: PlanOptions, says: str) -> None:
    with fails(ConfigError, found=says):
        plan_bundle(PUBLISHED, options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_disk_is_what_onnx_runtime_s_files_take(tmp_path: Path, dtype: str) -> None:
    """Data files, less than a page each apart; graphs, under a megabyte, are left out."""
    bundle = export_fixture("hybrid-a", tmp_path / "bundle", dtype)
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"))
    plan = plan_bundle(bundle.config, PlanOptions(target="ort-cpu", dtype=dtype))
    pages = 3 * PAGE
    stored = sum(p.stat().st_size for p in bundle.path.glob("*/*.onnx.data"))
    assert 0 <= plan.disk.bundle - stored < pages
    engine = bundle.path / "engines" / "ort-cpu"
    written = sum(p.stat().st_size for p in engine.glob("*.data"))
    assert (written == 0) == (dtype == "float32"), (
        "only narrow weights are widened into files of their own"
    )
    assert 0 <= plan.disk.engines["ort-cpu"] - written < pages
    assert sum(p.stat().st_size for p in engine.glob("*.onnx")) < 1e6


@pytest.mark.trained
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("mixed", "bfloat16"), ("int8-weights", "float32"), ("nvfp4-experts", "float32")],
)
def test_disk_is_what_quantized_weights_take_on_a_cpu(
    tmp_path: Path, recipe: str, dtype: str, dialect: str
) -> None:
    """Integers are written as products read them; in the standard dialect they stay."""
    floats = export_bundle(
        Checkpoint.open(TINY_CHECKPOINT), tmp_path / "float", ExportConfig(dtype=dtype)
    )
    made = builtin_recipes()[recipe]
    bundle = quantize_bundle(floats, plan_quantization(floats, made), tmp_path / "few")
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"), config=BuildConfig(dialect=dialect))
    options = PlanOptions(
        target="ort-cpu",
        dtype=dtype,
        formats=tuple(sorted(made.weights.items())),
        expert_path="dense" if dialect == STANDARD else "auto",
    )
    written = sum(p.stat().st_size for p in (bundle.path / "engines" / "ort-cpu").glob("*.data"))
    assert 0 <= plan_bundle(bundle.config, options).disk.engines["ort-cpu"] - written < 3 * PAGE


@pytest.mark.slow
@pytest.mark.trt_rtx
@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_disk_is_what_tensorrt_s_engines_take(tmp_path: Path, folder: str) -> None:
    bundle = export_fixture(folder, tmp_path / "bundle", "float16")
    config = BuildConfig(sms=(89,), max_context=256, experts="dense")
    record = build_engines(bundle, "rtx", builder_for("rtx"), config=config)
    options = replace(DENSE, dtype="float16", sms=(89,), max_context=256)
    plan = plan_bundle(bundle.config, options)
    assert {e.name for e in plan.engines} == set(record.files)
    # The figures are of published widths; a head of this one's is smaller.
    for engine in plan.engines:
        facts, size = record.report["engines"][engine.name], record.files[engine.name].size
        assert size <= engine.engine_bytes < 1.3 * size or engine.graph == "context_head"
        assert engine.build_peak_bytes is not None
        assert facts["peak_memory"] <= engine.build_peak_bytes < 1.35 * facts["peak_memory"]


def test_a_plan_is_plain_data() -> None:
    facts = plan_bundle(TINY, PlanOptions()).to_json()
    assert facts["parameters"] == sum(w["total"] for w in facts["weights"].values()) // 4
    dense = plan_bundle(TINY, replace(DENSE, dtype="float32")).to_json()
    assert [engine["name"] for engine in dense["engines"]] == WHOLE
    assert (facts["experts"]["name"], facts["passes"][1]["ar_step"]["tokens"]) == ("kernels", 1)
    assert facts["devices"][0]["total"] > facts["state"]["total"]
