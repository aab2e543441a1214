"""Engines for ONNX Runtime: what is written and kept, and what damaged or foreign ones say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.helpers.bundles import built_fixture, copy_of, export_fixture, flip_byte
from tests.helpers.errors import fails
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders import build as build_module
from twotower.builders.ort.cpu import OrtCpuPlan
from twotower.bundle import BUILD_FILE, GRAPH_FILES, Bundle, engine_folder, read_engine_record
from twotower.errors import BuildError, EngineMismatchError
from twotower.runtime import GenerationConfig, TwoTower
from twotower.runtime.engines.ort import OrtEngine, open_ort_cpu
from twotower.runtime.engines.towers import Towers
from twotower.weights.external import load_graph, located_weights, weight_refs

TARGET = "ort-cpu"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built_fixture("hybrid-a", tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def copy(built: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_of(built, tmp_path / "copy"))


def record_of(bundle: Bundle) -> Any:
    return read_engine_record(bundle, TARGET, library=builder_for(TARGET).library())


def left_in(bundle: Bundle) -> set[str]:
    return {p.name for p in engine_folder(bundle, TARGET).parent.iterdir()}


def test_float32_weights_are_not_copied(built: Bundle) -> None:
    record = record_of(built)
    assert record.weights == {name: f"{file}.data" for name, file in GRAPH_FILES.items()}
    assert sum(f.size for f in record.files.values()) < 400_000, "three graphs, no weights"


def test_transposes_of_weights_and_caches_are_fused_away(built: Bundle) -> None:
    """Otherwise every step would copy the weight or cache it multiplies."""
    for name in GRAPH_FILES:
        model = load_graph(engine_folder(built, TARGET) / f"{name}.onnx")
        large = {t.name for t in model.graph.initializer if t.external_data} | {
            i.name for i in model.graph.input if i.name.startswith("past_key_values")
        }
        for node in model.graph.node:
            if node.op_type in ("Transpose", "Concat"):
                assert not large & set(node.input), f"{name}: {node.name} copies {node.input[0]}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_bundles_are_widened_once(tmp_path: Path, dtype: str) -> None:
    bundle = built_fixture("hybrid-a", tmp_path / "b", dtype)
    record = record_of(bundle)
    assert record.dtype == "float32"
    assert record.report["widened_from"] == dtype
    for name, weights in record.weights.items():
        model = load_graph(engine_folder(bundle, TARGET) / f"{name}.onnx")
        refs = weight_refs(model)
        assert {ref.dtype for ref in refs.values()} == {"float32"}
        assert (bundle.path / weights).stat().st_size == max(
            ref.offset + ref.nbytes for ref in refs.values()
        )
        kinds = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
        assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_second_build_keeps_the_engine_and_force_makes_a_new_one(copy: Bundle) -> None:
    file = engine_folder(copy, TARGET) / BUILD_FILE
    before = file.stat().st_mtime_ns
    build_engines(copy, TARGET, builder_for(TARGET))
    assert file.stat().st_mtime_ns == before
    build_engines(copy, TARGET, builder_for(TARGET), config=BuildConfig(force=True))
    assert file.stat().st_mtime_ns > before
    assert left_in(copy) == {TARGET, f".{TARGET}.lock"}, "nothing else is left behind"


def test_damaged_engines_are_found_and_built_again(copy: Bundle) -> None:
    flip_byte(engine_folder(copy, TARGET) / "denoiser.onnx", 5000)
    with fails(EngineMismatchError, "does not fit", found="denoiser.onnx", do="twotower build"):
        record_of(copy)
    build_engines(copy, TARGET, builder_for(TARGET))
    record_of(copy)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"target": "rtx"}, "built for target rtx"),
        ({"library": {"name": "onnxruntime", "version": "0.1"}}, "built with onnxruntime 0.1"),
        ({"graphs": {}}, "built from another graph"),
        ("", "not readable"),
        ("[]", "not readable"),
        ("{}", "another version"),
    ],
)
def test_foreign_and_unreadable_records_do_not_fit(copy: Bundle, change: Any, found: str) -> None:
    path = engine_folder(copy, TARGET) / BUILD_FILE
    text = (
        change
        if isinstance(change, str)
        else json.dumps({**json.loads(path.read_text()), **change})
    )
    path.write_text(text)
    with fails(EngineMismatchError, found, do="twotower build"):
        record_of(copy)


def test_an_unbuilt_target_says_what_is_built(tmp_path: Path, copy: Bundle) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        read_engine_record(copy, "trt", library={})
    assert caught.value.found == "built targets: ort-cpu"
    with pytest.raises(BuildError, match="no builder"):
        builder_for("tpu")


def test_a_failed_build_leaves_the_old_engine(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = builder_for(TARGET)

    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OrtCpuPlan, "build", full)
    with pytest.raises(BuildError, match="could not be written"):
        build_engines(copy, TARGET, builder, config=BuildConfig(force=True))
    record_of(copy)
    assert left_in(copy) == {TARGET, f".{TARGET}.lock"}


def test_small_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "b", "bfloat16")
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(BuildError, match="disk space"):
        build_engines(bundle, TARGET, builder_for(TARGET))


def test_a_graph_the_library_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "b")
    path = bundle.graph_file("denoiser")
    model = load_graph(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BuildError, match="refuses the denoiser graph"):
        build_engines(bundle, TARGET, builder_for(TARGET))
    assert not engine_folder(bundle, TARGET).exists()


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_an_engine_that_cannot_be_loaded_says_how_to_get_one_that_can(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Damage is found by its hash; this is a whole graph that the installed library refuses."""
    real = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: content if self.suffix == ".onnx" else real(self)
    )
    with fails(EngineMismatchError, "cannot load", do="--force"):
        open_ort_cpu(copy)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_gets_the_graphs_as_they_were_exported(tmp_path: Path, dtype: str) -> None:
    """In the bundle's own precision: a CPU's optimiser would insert casts to float32."""
    bundle = export_fixture("hybrid-a", tmp_path / "b", dtype)
    config = BuildConfig(experts="dense")
    build_engines(bundle, "ort-cuda", builder_for("ort-cuda"), config=config)
    record = read_engine_record(bundle, "ort-cuda", library=builder_for("ort-cuda").library())
    assert record.dtype == dtype
    assert record.weights == {name: f"{file}.data" for name, file in GRAPH_FILES.items()}
    assert sorted(record.files) == sorted(f"{name}.onnx" for name in GRAPH_FILES), (
        "graphs and no weights"
    )
    for name in GRAPH_FILES:
        engine = load_graph(engine_folder(bundle, "ort-cuda") / f"{name}.onnx")
        exported = load_graph(bundle.graph_file(name))
        assert list(engine.graph.node) == list(exported.graph.node)
        assert engine.graph.input == exported.graph.input
        assert engine.graph.output == exported.graph.output
        assert weight_refs(engine) == weight_refs(exported)
        assert {ref.dtype for ref in weight_refs(engine).values()} <= {dtype, "float32"}
        assert record.report["operators"][name]["MatMul"] == sum(
            node.op_type == "MatMul" for node in exported.graph.node
        )
        assert {file for file, _ in located_weights(engine).values()} == {record.weights[name]}


def test_a_gpu_engine_computes_what_the_cpu_engine_computes(tmp_path: Path, built: Bundle) -> None:
    """The same file on the provider that is here finds its weights and computes the same."""
    bundle = Bundle.open(copy_of(built, tmp_path / "copy"))
    build_engines(bundle, "ort-cuda", builder_for("ort-cuda"), config=BuildConfig(experts="dense"))
    texts = []
    for target in ("ort-cpu", "ort-cuda"):
        engines = []
        for name, signature in bundle.signatures.items():
            file = engine_folder(bundle, target) / f"{name}.onnx"
            engines.append(OrtEngine(file, bundle.path, signature, pack=False))
        with TwoTower.from_towers(Towers(bundle.config, "float32", *engines)) as model:
            config = GenerationConfig(max_new_tokens=32, ignore_eos=True)
            texts.append(model.generate([5, 6, 7], config).tokens)
    assert texts[0] == texts[1]
