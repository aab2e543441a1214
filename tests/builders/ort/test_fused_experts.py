"""Experts as one operator a layer: the exported graph's numbers, in the library's schema."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from tests.helpers.bundles import export_fixture
from tests.helpers.errors import check_error, fails
from tests.helpers.fused_experts import fused_nodes, with_bodies, with_cpu_kernels
from tests.helpers.graph_runs import random_inputs as feed
from tests.helpers.graph_runs import run_graph as run
from tests.helpers.graphs import FIXTURES
from tests.helpers.moe_layer import PREFIX, recorded_moe
from tests.helpers.small_slice import SMALL_SLICE
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.ort.engine_weights import EngineWeight, write_engine_data
from twotower.builders.ort.fusable import require_fusable
from twotower.builders.ort.fused_experts import fuse_experts
from twotower.builders.ort.nodes import attributes_of
from twotower.builders.ort.quantized_products import UNSIGNED
from twotower.bundle import (
    BUILD_FILE,
    DATA_SUFFIX,
    GRAPH_FILES,
    Bundle,
    ExpertsStep,
    FileRecord,
    engine_folder,
    hash_file,
    load_engine_record,
)
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.checkpoint.synthetic import published_slice, write_checkpoint
from twotower.cli.main import main
from twotower.config import ModelConfig, read_model_config
from twotower.errors import BuildError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.onnx_runtime import session_options
from twotower.planning import PlanOptions, plan_bundle
from twotower.spec import CONTEXT, DENOISER, TensorSpec, signatures
from twotower.weights import mapped
from twotower.weights.external import attach_weights, load_graph, located_weights, widen_to_float32
from twotower.weights.mapped import read_weight
from twotower.weights.refs import PAGE, WeightRef
from twotower.weights.writer import widen_data

FUSED = BuildConfig(experts="fused")
SLICE = {**published_slice("MEM*E"), **SMALL_SLICE, "n_routed_experts": 8, "num_experts_per_tok": 3}
TOWERS = (CONTEXT, DENOISER)


def fused(bundle: Bundle) -> Bundle:
    build_engines(bundle, "ort-cuda", builder_for("ort-cuda"), config=FUSED)
    return bundle


def engine(bundle: Bundle, graph: str) -> onnx.ModelProto:
    return load_graph(engine_folder(bundle, "ort-cuda") / f"{graph}.onnx")


@pytest.fixture(scope="module", params=["hybrid-a", "hybrid-b"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fused(export_fixture(request.param, tmp_path_factory.mktemp("fused") / "bundle"))


@pytest.fixture(scope="module")
def few_bits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle with experts of a width, made once; 8-bit rows above 128 have groups of 64."""
    made: dict[tuple[str, int, str], Bundle] = {}

    def make(recipe: str, width: int = 64, dtype: str = "bfloat16") -> Bundle:
        key = (recipe, width, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(recipe)
            sizes = {"hidden_size": width, "moe_intermediate_size": width, "torch_dtype": dtype}
            source = write_checkpoint(folder / "checkpoint", {**SLICE, **sizes})
            checkpoint = Checkpoint.open(source)
            whole = export_bundle(checkpoint, folder / "float", ExportConfig(dtype=dtype))
            plan = plan_quantization(whole, builtin_recipes()[recipe])
            made[key] = quantize_bundle(whole, plan, folder / "few")
        return made[key]

    return make


def compare(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("graph", TOWERS)
def test_it_is_the_exported_graph(bundle: Bundle, graph: str) -> None:
    """Written out in standard operators, and by the library's own kernels."""
    model = engine(bundle, graph)
    inputs = feed(bundle.signatures[graph].inputs, bundle.config.vocab_size)
    nodes = fused_nodes(model)
    assert [node.op_type for node in nodes] == ["MoE"] * bundle.config.pattern.count("E")
    whole = run(load_graph(bundle.graph_file(graph)), bundle.graph_file(graph).parent, inputs)
    compare(run(with_bodies(model), bundle.path, inputs), whole, 2e-6)
    compare(run(with_cpu_kernels(model, bundle.path), bundle.path, inputs), whole, 2e-5)


@pytest.mark.parametrize("graph", TOWERS)
def test_a_row_alone(bundle: Bundle, graph: str) -> None:
    """Against the same row in a batch, but for the order in which a CPU adds up."""
    model = with_bodies(engine(bundle, graph))
    inputs = feed(bundle.signatures[graph].inputs, bundle.config.vocab_size)
    together = run(model, bundle.path, inputs)
    alone = run(model, bundle.path, {name: value[:1] for name, value in inputs.items()})
    compare(alone, {name: value[:1] for name, value in together.items()}, 5e-6)


def widened(model: onnx.ModelProto, home: Path, folder: Path) -> onnx.ModelProto:
    """A half-precision graph in float32, its weights in files of `folder`; integers as they are."""
    located = located_weights(model)
    widen_to_float32(model)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.t.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
                wide = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide))
    folder.mkdir(exist_ok=True)
    for number, location in enumerate(sorted({location for location, _ in located.values()})):
        refs = {name: ref for name, (where, ref) in located.items() if where == location}
        name = f"{number}.data"
        attach_weights(model, widen_data(home / location, folder / name, refs), name)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("graph", TOWERS)
@pytest.mark.parametrize(
    ("recipe", "width", "group"),
    [("int4-experts", 64, 32), ("int8-weights", 64, 0), ("int8-weights", 192, 64)],
)
def test_experts_in_few_bits(
    few_bits: Any, tmp_path: Path, recipe: str, width: int, group: int, graph: str
) -> None:
    """The graph that dequantizes, in float32: what the operator reads are the same weights."""
    bundle = fused(few_bits(recipe, width))
    inputs = feed(signatures(bundle.config, "float32")[graph].inputs, bundle.config.vocab_size)
    file = bundle.graph_file(graph)
    whole = widened(load_graph(file), file.parent, tmp_path / "whole")
    want = run(whole, tmp_path / "whole", inputs)
    model = widened(engine(bundle, graph), bundle.path, tmp_path / "fused")
    nodes = fused_nodes(model)
    assert [node.op_type for node in nodes] == ["QMoE"] * 2
    assert [a.i for node in nodes for a in node.attribute if a.name == "block_size"] == (
        [group] * 2 if group else []
    )
    compare(run(with_bodies(model), tmp_path / "fused", inputs), want, 1e-5)
    if recipe == "int4-experts":  # of 8 bits the CPU's kernel rounds the tokens too
        ours = run(with_cpu_kernels(model, tmp_path / "fused"), tmp_path / "fused", inputs)
        compare(ours, want, 1e-4)


def resolved(bundle: Bundle, model: onnx.ModelProto) -> str:
    """What ONNX Runtime says to a graph on a CPU: it checks schemas, then looks for kernels."""
    options = session_options(bundle.path, threads=1)
    options.log_severity_level = 4
    with pytest.raises(Exception, match="ONNXRuntimeError") as error:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return str(error.value)


def test_the_library_takes_the_graph_and_its_cpu_refuses_the_activation(bundle: Bundle) -> None:
    for graph in TOWERS:
        assert "Unsupported MoE activation type: relu2" in resolved(bundle, engine(bundle, graph))
    wrong = engine(bundle, DENOISER)
    fused_nodes(wrong)[0].attribute[0].name = "no_such_attribute"
    assert "INVALID_GRAPH" in resolved(bundle, wrong)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_library_takes_the_graph_in_few_bits(few_bits: Any, dtype: str) -> None:
    """A CPU has no kernels for most of it, and looks for them once all types fit."""
    bundle = fused(few_bits("int4-experts", dtype=dtype))
    for graph in TOWERS:
        told = resolved(bundle, engine(bundle, graph))
        assert "NOT_IMPLEMENTED" in told or "Unsupported MoE activation type: relu2" in told
    wrong = engine(bundle, DENOISER)
    node = fused_nodes(wrong)[0]
    node.input[3] = node.input[2]  # scales that are uint8
    assert "Type Error" in resolved(bundle, wrong)


COMMON = {"k": 1, "activation_type": b"relu2", "normalize_routing_weights": 1}
INTEGERS = {**COMMON, "quant_type": b"int", "weights_prepacked": 0}


IN_4_BITS = {"expert_weight_bits": 4, "block_size": 32}
IN_8_BITS = {"expert_weight_bits": 8}


@pytest.mark.parametrize(
    ("recipe", "width", "options", "shapes"),
    [
        ("int4-experts", 64, IN_4_BITS, ((8, 64, 32), (8, 64, 2))),
        ("int8-weights", 64, IN_8_BITS, ((8, 64, 64), (8, 64))),
        ("int8-weights", 192, {**IN_8_BITS, "block_size": 64}, ((8, 192, 192), (8, 192, 3))),
    ],
)
def test_operands_are_those_of_the_documentation(
    few_bits: Any, recipe: str, width: int, options: Any, shapes: Any
) -> None:
    """Unsigned [E,out,in*bits/8], scales [E,out,in/block] or [E,out]; no bias, no zero points."""
    model = engine(fused(few_bits(recipe, width)), DENOISER)
    tensors = {t.name: t for t in model.graph.initializer}
    for node in fused_nodes(model):
        assert attributes_of(node) == {**INTEGERS, **options}
        _, _, up, up_scale, no_bias, down, down_scale = node.input
        assert no_bias == ""
        for values, scale in ((up, up_scale), (down, down_scale)):
            kinds = [tensors[name].data_type for name in (values, scale)]
            assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.BFLOAT16]
            assert tuple(tuple(tensors[name].dims) for name in (values, scale)) == shapes


def test_float_operands_are_the_bundle_s_own(bundle: Bundle) -> None:
    config = bundle.config
    e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    model = engine(bundle, CONTEXT)
    places = located_weights(model)
    for node in fused_nodes(model):
        assert attributes_of(node) == COMMON
        _, _, up, no_bias, down = node.input
        assert no_bias == ""
        assert (places[up][1].shape, places[down][1].shape) == ((e, f, d), (e, d, f))
        file = f"{GRAPH_FILES[CONTEXT]}{DATA_SUFFIX}"
        for name in (up, down):
            assert places[name] == (file, bundle.weights(CONTEXT)[name])


def test_this_library_s_cuda_kernels_take_the_activation() -> None:
    """By its own words; an earlier one is refused by its version."""
    for name in ("MoE", "QMoE"):
        (schema,) = [s for s in get_all_operator_schema() if s.name == name]
        taken = "CUDA also supports relu2" in schema.attributes["activation_type"].description
        assert taken == (tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 32))


STEP = ExpertsStep(
    layer=1,
    hidden=2688,
    width=1856,
    experts=128,
    top=6,
    shared_intermediate=3712,
    dtype="bfloat16",
    formats={},
    code="",
    weights={},
)


def layer(
    config: ModelConfig, folder: Path, **changed: np.ndarray[Any, Any]
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A layer of experts alone on random weights: as it is exported, and fused and written out."""

    def value_of(name: str, ref: WeightRef) -> np.ndarray[Any, Any]:
        value = np.random.default_rng(len(name)).standard_normal(ref.shape, dtype=np.float32) / 8
        return next((new for part, new in changed.items() if part in name), value)

    recorded, _ = recorded_moe(folder, config, value_of)
    whole = ir.to_proto(recorded)
    names = {role: f"{PREFIX}experts.{role}_proj.weight" for role in ("up", "down")}
    weights = {role: TensorSpec(name, "float32", ()) for role, name in names.items()}
    top, count = config.num_experts_per_tok, config.n_routed_experts
    sizes = {"hidden": config.hidden_size, "width": config.moe_intermediate_size}
    made = {"layer": 0, "dtype": "float32", "weights": weights, "shared_intermediate": 0}
    step = replace(STEP, **sizes, **made, experts=count, top=top)
    model = ir.to_proto(recorded)
    assert fuse_experts(model, [step]) == {}
    return whole, with_bodies(model)


def layer_config(**changed: Any) -> ModelConfig:
    config = read_model_config(FIXTURES / "hybrid-a" / "config.json")
    return replace(config, dtype="float32", n_shared_experts=0, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 8},
        {"n_group": 4, "topk_group": 2},
        {"norm_topk_prob": False, "routed_scaling_factor": 0.5},
    ],
)
def test_every_way_to_route(tmp_path: Path, changed: dict[str, Any]) -> None:
    whole, made = layer(layer_config(**changed), tmp_path)
    for rows, length in ((1, 1), (3, 16)):
        x = np.random.default_rng(1).standard_normal((rows, length, 64), dtype=np.float32)
        got, want = (run(graph, tmp_path, {"x": x})["y"] for graph in (made, whole))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_equal_scores_and_a_share_of_nothing(tmp_path: Path) -> None:
    """Of equal scores the first win, a bias moves no share, unchosen results may overflow."""
    bias = np.zeros((8, 1), np.float32)
    bias[5] = 1
    up = np.random.default_rng(3).standard_normal((8, 48, 64), dtype=np.float32)
    up[7] = np.inf
    changed = {"gate.weight": np.zeros(1, np.float32), "bias": bias, "up_proj": up}
    whole, made = layer(layer_config(), tmp_path, **changed)
    x = np.random.default_rng(1).standard_normal((2, 16, 64), dtype=np.float32)
    got = run(made, tmp_path, {"x": x})["y"]
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, run(whole, tmp_path, {"x": x})["y"], rtol=1e-6, atol=2e-6)


def test_a_token_that_is_not_a_number_harms_no_other(tmp_path: Path) -> None:
    _, made = layer(layer_config(), tmp_path)
    x = np.random.default_rng(1).standard_normal((3, 16, 64), dtype=np.float32)
    want = run(made, tmp_path, {"x": x})["y"]
    x[1, 4] = np.nan
    got = run(made, tmp_path, {"x": x})["y"]
    assert np.isnan(got[1, 4]).all()
    got[1, 4] = want[1, 4]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_integers_are_unsigned_and_all_else_stays_in_the_bundle(few_bits: Any) -> None:
    for recipe, middle in (("int4-experts", 8), ("int8-weights", 128)):
        bundle = fused(few_bits(recipe))
        record = load_engine_record(bundle, "ort-cuda")
        data = {f"{graph}.data" for graph in TOWERS}
        assert set(record.files) == {f"{graph}.onnx" for graph in GRAPH_FILES} | data
        assert record.holds == {graph: bundle.data_identity(graph) for graph in TOWERS}
        for graph in TOWERS:
            own = f"engines/ort-cuda/{graph}.data"
            places = located_weights(engine(bundle, graph)).items()
            moved = {name: ref for name, (where, ref) in places if where == own}
            assert len(moved) == 2 * 2
            assert record.files[f"{graph}.data"].size == max(ref.end for ref in moved.values())
            files = (own, f"{GRAPH_FILES[graph]}.data")
            ours, theirs = (np.memmap(bundle.path / f, np.uint8, "r") for f in files)
            for name, ref in moved.items():
                signed = read_weight(theirs, bundle.weights(graph)[name]).astype(np.int64)
                raw = ours[ref.offset : ref.end].reshape(ref.shape)
                if middle == 8:
                    raw = np.stack((raw & 15, raw >> 4), -1).reshape(signed.shape)
                np.testing.assert_array_equal(raw.astype(np.int64) - middle, signed)


def test_a_large_matrix_is_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "PIECE_BYTES", 7)
    data = np.random.default_rng(0).integers(0, 256, 200, np.uint8)
    (tmp_path / "in").write_bytes(data.tobytes())
    told: list[int] = []
    refs = {"b": WeightRef("int8", (4, 10), 150), "a": WeightRef("int4", (2, 5, 6), 64)}
    weights = {name: EngineWeight(ref, UNSIGNED[ref.dtype]) for name, ref in refs.items()}
    places, record = write_engine_data(tmp_path / "in", tmp_path / "out", weights, told.append)
    made = np.frombuffer((tmp_path / "out").read_bytes(), np.uint8)
    assert places == {"a": WeightRef("uint4", (2, 5, 6), 0), "b": WeightRef("uint8", (4, 10), 64)}
    assert record == FileRecord(made.size, hash_file(tmp_path / "out"))
    np.testing.assert_array_equal(made[:30], data[64:94] ^ 0x88)
    np.testing.assert_array_equal(made[64:104], data[150:190] ^ 0x80)
    assert (sum(told), max(told)) == (70, 7)


class TestBuilding:
    def test_fused_is_what_auto_builds(self, bundle: Bundle, tmp_path: Path) -> None:
        build_engines(bundle, "ort-cuda", builder_for("ort-cuda"))
        record = load_engine_record(bundle, "ort-cuda")
        assert record.report["choice_of_experts"] == {"computed_by": "fused"}
        assert record.holds == {}
        assert set(record.files) == {f"{graph}.onnx" for graph in GRAPH_FILES}, (
            "no weight is copied"
        )
        experts = bundle.config.pattern.count("E")
        for graph in TOWERS:
            operators = record.report["operators"][graph]
            exported = [n.op_type for n in load_graph(bundle.graph_file(graph)).graph.node]
            assert operators["MoE"] == experts
            assert operators["MatMul"] < exported.count("MatMul")

    def test_another_choice_is_another_engine(self, tmp_path: Path) -> None:
        bundle = export_fixture("hybrid-a", tmp_path / "b")
        file = engine_folder(bundle, "ort-cuda") / BUILD_FILE
        stamps = []
        for experts in ("fused", "auto", "dense", "dense", "fused"):
            config = BuildConfig(experts=experts)
            build_engines(bundle, "ort-cuda", builder_for("ort-cuda"), config=config)
            stamps.append(file.stat().st_mtime_ns)
        assert (stamps[0] == stamps[1], stamps[2] == stamps[3]) == (True, True)
        assert stamps[1] < stamps[2] < stamps[4]

    def test_the_room_on_the_disk_counts_what_is_written(self, few_bits: Any) -> None:
        bundle, builder = few_bits("int4-experts"), builder_for("ort-cuda")
        fused(bundle)
        record = load_engine_record(bundle, "ort-cuda")
        data = [name for name in record.files if name.endswith(DATA_SUFFIX)]
        written = sum(record.files[name].size for name in data)
        moved = 2 * 2 * 2 * 8 * 64 * 64 // 2
        assert moved <= written <= moved + 4 * 4096
        dense = builder.plan(bundle, BuildConfig(experts="dense")).needed_bytes
        assert builder.plan(bundle, FUSED).needed_bytes == dense + moved
        assert "written anew" in builder.plan(bundle, FUSED).describe()[1]

    def test_inspect_says_so(self, few_bits: Any, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["inspect", str(fused(few_bits("int4-experts")).path)]) == 0
        told = "experts are fused: 4 QMoE of ONNX Runtime compute the chosen ones"
        assert told in capsys.readouterr().out


NVFP4 = "nvfp4 in groups of 16; it takes int4 and int8"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "dtype", "what", "found"),
    [
        ("nvfp4-experts", "bfloat16", "does not compute experts in this format", NVFP4),
        ("int4-experts", "float32", "no CUDA kernel for float32", "int4 in groups of 32"),
    ],
)
def test_a_format_it_does_not_hold(
    few_bits: Any,
    recipe: str,
    dtype: str,
    what: str,
    found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Refused where it was asked for, and dense with a note where it was not."""
    bundle = few_bits(recipe, dtype=dtype)
    assert main(["build", str(bundle.path), "--target", "ort-cuda", "--experts", "fused"]) == 2
    err = capsys.readouterr().err
    check_error(err, what)
    assert found in err
    assert "--experts dense" in err
    assert not engine_folder(bundle, "ort-cuda").exists()
    assert main(["build", str(bundle.path), "--target", "ort-cuda"]) == 0
    assert "note: experts are dense: com.microsoft.QMoE" in capsys.readouterr().err
    assert "QMoE" not in load_engine_record(bundle, "ort-cuda").report["operators"][CONTEXT]


def in_bits(name: str, group: int) -> dict[str, Any]:
    return {"formats": {"up": (name, group), "down": (name, group)}}


HELD = [in_bits("int4", 32), in_bits("int4", 64), in_bits("int8", 64), in_bits("int8", 0)]


@pytest.mark.parametrize("changed", [{}, {"dtype": "float32"}, *HELD])
def test_published_experts_are_held(changed: dict[str, Any]) -> None:
    require_fusable(replace(STEP, **changed), "1.32.0")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"hidden": 2684}, "hidden_size 2684; in bfloat16 multiples of 8"),
        ({"width": 8}, "moe_intermediate_size 8"),
        ({"dtype": "float32", "width": 1854}, "in float32 multiples of 4"),
        (in_bits("int4", 96), "96 weights a scale; 32, 64, 128, or a whole row"),
        (in_bits("int4", 128), "moe_intermediate_size 1856; multiples of 128"),
        ({**in_bits("int8", 0), "hidden": 2656}, "hidden_size 2656; multiples of 64"),
        (in_bits("fp8", 0), "fp8; it takes int4 and int8"),
        ({"formats": {"up": ("int8", 64)}}, "int8 in groups of 64 and bfloat16"),
        (
            {"formats": {"up": ("int8", 0), "down": ("int8", 64)}},
            "int8 and int8 in groups of 64; it takes int4 and int8 with one group",
        ),
    ],
)
def test_what_no_kernel_takes(changed: dict[str, Any], found: str) -> None:
    with fails(BuildError, found=found, do="--experts dense"):
        require_fusable(replace(STEP, **changed), "1.32.0")


@pytest.mark.parametrize("version", ["1.27.0", "1.31.1"])
def test_an_earlier_library(version: str) -> None:
    with fails(BuildError, f"ONNX Runtime {version} has no fused experts", found="from 1.32 on"):
        require_fusable(STEP, version)


def test_tensorrt_has_no_such_operator(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(bundle.path), "--target", "rtx", "--sm", "89"]
    assert main([*words, "--experts", "fused"]) == 2
    check_error(capsys.readouterr().err, "TensorRT has no operator for these experts")


@pytest.mark.parametrize(("recipe", "width"), [("int4-experts", 64), ("int8-weights", 192)])
def test_the_second_copy_of_integers_is_what_a_plan_says(
    few_bits: Any, recipe: str, width: int
) -> None:
    bundle, made = fused(few_bits(recipe, width)), builtin_recipes()[recipe]
    formats, rounded = tuple(sorted(made.weights.items())), made.activations
    options = PlanOptions(target="ort-cuda", dtype="bfloat16", formats=formats, rounded=rounded)
    planned = plan_bundle(bundle.config, options)
    assert planned.experts.name == "fused"
    written = sum(file.stat().st_size for file in engine_folder(bundle, "ort-cuda").glob("*.data"))
    copies = planned.disk.copies["ort-cuda"]
    assert 0 < copies <= written < copies + 20 * PAGE
