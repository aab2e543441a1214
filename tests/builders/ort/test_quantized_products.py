"""Quantized weights on a CPU, multiplied as stored where the processor computes rows alike."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.helpers.bundles import copy_of
from tests.helpers.errors import fails
from tests.helpers.fake_quantization import block_of, in_blocks
from tests.helpers.quantized import TINY
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.ort import cpu as ort_builder
from twotower.builders.ort.cpu import write_engine
from twotower.builders.ort.engine_weights import cpu_weights, write_engine_data
from twotower.builders.ort.quantized_products import probe_graph
from twotower.bundle import BUILD_FILE, Bundle, engine_folder, load_engine_record
from twotower.calibration import QuantizeConfig, builtin_recipes, plan_quantization, quantize_bundle
from twotower.cli.main import main
from twotower.errors import EngineMismatchError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.onnx_runtime import ort, session_options
from twotower.product_probe import EVEN_ROWS, PROBE_FILE, rows_are_alike
from twotower.runtime import GenerationConfig, TwoTower
from twotower.runtime.device import HostStream
from twotower.runtime.engines import ort as ort_engine
from twotower.runtime.engines.ort import open_ort_cpu
from twotower.weights.external import attach_weights, load_graph, weight_refs
from twotower.weights.refs import WeightRef

Array = np.ndarray[Any, Any]
Run = Callable[[Array, Array], list[Array]]
N, V = 144, 50
FORMATS = [
    ("int4", 32, 192),
    ("int4", 64, 192),
    ("int4", 96, 192),
    ("int4", 128, 224),
    ("int4", 128, 256),
    ("int8", 0, 160),
    ("int8", 0, 384),
    ("int8", 64, 192),
]


def stored(dtype: str, values: Array) -> Array:
    """Values as a bundle has them: two of 4 bits in a byte, the first in the low half."""
    if dtype == "int8":
        return np.ascontiguousarray(values, np.int8).view(np.uint8).reshape(-1)
    low, high = (values.reshape(-1)[i::2].astype(np.uint8) & 15 for i in (0, 1))
    return low | (high << 4)


class Graph:
    """A product, and a lookup in a table, of few bits: as an engine, on random numbers."""

    def __init__(self, folder: Path, dtype: str, group: int, columns: int) -> None:
        random, self.folder = np.random.default_rng(1), folder
        largest = {"int4": 7, "int8": 127}[dtype]
        self.values = random.integers(-largest - 1, largest + 1, (N, columns))
        shape = (N, -(-columns // group)) if group else (N,)
        self.scales = random.uniform(0.01, 0.02, shape).astype(np.float32)
        self.table = random.integers(-128, 128, (V, columns))
        self.table_scales = random.uniform(0.01, 0.02, V).astype(np.float32)
        each = np.repeat(self.scales.reshape(N, -1), group or columns, axis=1)[:, :columns]
        self.weight = self.values * each
        parts = {
            "w": (dtype, self.values.shape, stored(dtype, self.values)),
            "w.scale": ("float32", self.scales.shape, self.scales.view(np.uint8).reshape(-1)),
            "t": ("int8", self.table.shape, stored("int8", self.table)),
            "t.scale": ("float32", (V,), self.table_scales.view(np.uint8)),
        }
        data, refs = b"", {}
        for name, (kind, shape, raw) in parts.items():
            refs[name] = WeightRef(kind, shape, len(data))
            data += raw.tobytes() + bytes(-len(raw) % 64)
        (folder / "bundle.data").write_bytes(data)
        blocks = {"axis": 1, "block_size": group} if group else {"axis": 0}
        node, value = helper.make_node, helper.make_tensor_value_info
        nodes = [
            node("DequantizeLinear", ["w", "w.scale"], ["wide"], name="read", **blocks),
            node("Transpose", ["wide"], ["turned"], name="turn", perm=[1, 0]),
            node("MatMul", ["x", "turned"], ["y"], name="product"),
            node("DequantizeLinear", ["t", "t.scale"], ["rows"], name="read_table", axis=0),
            node("Gather", ["rows", "ids"], ["e"], name="look_up"),
        ]
        x = value("x", TensorProto.FLOAT, ["B", "L", columns])
        ids = value("ids", TensorProto.INT64, ["B", "L"])
        outs = [value(name, TensorProto.FLOAT, ["B", "L", None]) for name in ("y", "e")]
        graph, opset = helper.make_graph(nodes, "g", [x, ids], outs), helper.make_opsetid("", 24)
        self.model = helper.make_model(graph, opset_imports=[opset], ir_version=11)
        attach_weights(self.model, refs, "bundle.data")

    def engine(self, *, as_stored: bool, even_rows: bool = False) -> tuple[Run, onnx.ModelProto]:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        weights = cpu_weights(model, as_stored=as_stored, even_rows=even_rows)
        located = {name: ("bundle.data", ref) for name, ref in weight_refs(model).items()}
        files = (self.folder / "bundle.data", self.folder / "own.data")
        written, _ = write_engine_data(*files, weights)
        located |= {name: ("own.data", ref) for name, ref in written.items()}
        file = self.folder / f"{as_stored}.onnx"
        write_engine(model, located, file, name="few bits", top=1 if as_stored else None)
        options = session_options(self.folder, threads=2)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = ["CPUExecutionProvider"]
        session = ort.InferenceSession(file.read_bytes(), options, providers=providers)
        return lambda x, ids: session.run(None, {"x": x, "ids": ids}), load_graph(file)


def inputs(columns: int, rows: int, length: int) -> tuple[Array, Array]:
    random = np.random.default_rng(5)
    x = random.standard_normal((rows, length, columns), dtype=np.float32)
    x[0, 0, :32] = 0  # a block without a greatest value
    return x, random.integers(0, V, (rows, length))


@pytest.mark.parametrize("even_rows", [False, True])
@pytest.mark.parametrize(("dtype", "group", "columns"), FORMATS)
def test_a_product_is_that_of_its_twin(
    tmp_path: Path, dtype: str, group: int, columns: int, even_rows: bool
) -> None:
    """The input in 8 bits for each block, sums exact: only float32 rounding is left."""
    run, model = Graph(tmp_path, dtype, group, columns).engine(as_stored=True, even_rows=even_rows)
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}
    (product,) = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    assert not any(node.input[1] == "wide" for node in model.graph.node if len(node.input) > 1), (
        product.name
    )
    block = block_of(columns, group, even_rows=even_rows)
    assert block in {a.i for a in product.attribute if a.name == "block_size"}
    assert (EVEN_ROWS in {entry.key for entry in model.metadata_props}) == (block > 32), (
        "the engine's opener is told"
    )
    x, ids = inputs(columns, 3, 16)
    weight = Graph(tmp_path, dtype, group, columns).weight
    want = in_blocks(torch.from_numpy(x), block).double().numpy() @ weight.T
    np.testing.assert_allclose(run(x, ids)[0], want, rtol=0, atol=1e-6 * float(abs(want).max()))
    exact = x.astype(np.float64) @ weight.T
    assert np.abs(want - exact).max() > 1e-4 * np.abs(exact).max(), "the rounding of inputs shows"


@pytest.mark.parametrize(("dtype", "group", "columns"), FORMATS)
def test_a_lookup_expands_the_rows_it_looks_up(
    tmp_path: Path, dtype: str, group: int, columns: int
) -> None:
    graph = Graph(tmp_path, dtype, group, columns)
    x, ids = inputs(columns, 2, 16)
    (run, model), (standard, _) = (graph.engine(as_stored=as_stored) for as_stored in (True, False))
    assert np.array_equal(run(x, ids)[1], standard(x, ids)[1])
    table = graph.table.astype(np.float32) * graph.table_scales[:, None]
    assert np.array_equal(run(x, ids)[1], table[ids])
    readers = [node.op_type for node in model.graph.node if "t" in node.input]
    assert readers == ["Gather"]


@pytest.mark.parametrize("length", [1, 16])
@pytest.mark.parametrize(("dtype", "group", "columns"), FORMATS)
def test_a_row_s_numbers_are_its_own(
    tmp_path: Path, dtype: str, group: int, columns: int, length: int
) -> None:
    run, _ = Graph(tmp_path, dtype, group, columns).engine(as_stored=True)
    x, ids = inputs(columns, 32, length)
    alone = rows_alone(run, x, ids)
    order = np.random.default_rng(1).permutation(32)
    assert np.array_equal(run(x[order], ids[order])[0], alone[order])


def rows_alone(run: Run, x: Array, ids: Array) -> Array:
    """Every row's product alone, which is what it is beside others."""
    alone = np.concatenate([run(x[i : i + 1], ids[i : i + 1])[0] for i in range(len(x))])
    for rows in (2, 3, 8, 32):
        assert np.array_equal(run(x[:rows], ids[:rows])[0], alone[:rows]), rows
    return alone


@pytest.mark.parametrize(
    ("dtype", "group", "columns"), [f for f in FORMATS if block_of(*f[:0:-1], even_rows=True) > 32]
)
def test_wide_blocks_compute_even_numbers_of_rows_alike(
    tmp_path: Path, dtype: str, group: int, columns: int
) -> None:
    run, _ = Graph(tmp_path, dtype, group, columns).engine(as_stored=True, even_rows=True)
    x, ids = inputs(columns, 32, 16)
    alone = rows_alone(run, x, ids)
    order = np.random.default_rng(1).permutation(16)
    reordered = run(x[:1, order], ids[:1, order])[0]
    assert np.array_equal(reordered, alone[:1, order]), "wherever a row stands"


def test_rows_that_no_block_divides_are_expanded(tmp_path: Path) -> None:
    model = Graph(tmp_path, "int8", 0, 100).model
    assert not cpu_weights(model, as_stored=True)["w"].stored
    assert cpu_weights(Graph(tmp_path, "int8", 0, 160).model, as_stored=True)["w"].stored == "uint8"


def test_a_processor_is_asked() -> None:
    assert rows_are_alike(probe_graph()), "this processor keeps rows apart"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", 8]) for name in "xy")
    mean = [
        helper.make_node("ReduceMean", ["x"], ["m"], keepdims=1),
        helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    graph = helper.make_graph(mean, "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert not rows_are_alike(model.SerializeToString())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("few")
    bundle = export_bundle(Checkpoint.open(TINY), folder / "float", ExportConfig(dtype="bfloat16"))
    plan = plan_quantization(bundle, builtin_recipes()["mixed"], QuantizeConfig(rounding="plain"))
    return quantize_bundle(bundle, plan, folder / "mixed")


@pytest.fixture
def copy(few: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_of(few, tmp_path / "copy"))


def build(bundle: Bundle, dialect: str = "chosen") -> dict[str, Any]:
    builder = builder_for("ort-cpu")
    config = BuildConfig(dialect=dialect)
    expected = builder.plan(bundle, config).needed_bytes
    build_engines(bundle, "ort-cpu", builder, config=config)
    record = load_engine_record(bundle, "ort-cpu")
    own = sum(record.files[name].size for name in record.files if name.endswith(".data"))
    graphs = sum(bundle.files[name].size for name in bundle.files if name.endswith(".onnx"))
    assert own <= expected - graphs <= own, "what is written is what was announced"
    return record.report


def text(bundle: Bundle) -> list[int]:
    with TwoTower.open(bundle.path, target="ort-cpu") as model:
        config = GenerationConfig(max_new_tokens=16, ignore_eos=True)
        return model.generate([5, 6, 7], config).tokens


@pytest.mark.parametrize("length", [1, 15])
def test_a_pass_of_an_odd_number_of_positions_computes_a_row_alike(
    copy: Bundle, length: int
) -> None:
    """The denoiser's blocks are wide: its engine runs such a pass with one row more."""
    build(copy)
    with contextlib.closing(open_ort_cpu(copy).denoiser) as engine:
        assert engine._even_rows

        def run(rows: int, first: int = 0) -> dict[str, Array]:
            random, arrays = np.random.default_rng(3), {}
            for spec in (*engine.signature.inputs, *engine.signature.outputs):
                shape = spec.shape({"B": 5, "S": length, "T": 32})
                drawn = random.integers(1, 9, shape)
                whole = drawn if spec.dtype == "int64" else random.random(shape)
                arrays[spec.name] = np.ascontiguousarray(whole[first : first + rows], spec.dtype)
            given = {spec.name: arrays[spec.name].copy() for spec in engine.signature.inputs}
            engine.bind(arrays).run(HostStream())
            assert all(np.array_equal(arrays[name], value) for name, value in given.items()), (
                "inputs are only read"
            )
            return {spec.name: arrays[spec.name] for spec in engine.signature.outputs}

        together = {rows: run(rows) for rows in (2, 3, 4)}
        for rows, outputs in together.items():
            for i in range(rows):
                for name, value in run(1, i).items():
                    assert np.array_equal(outputs[name][i], value[0]), (rows, i, name)


def test_every_weight_of_few_bits_is_read_as_it_is_stored(
    copy: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    report = build(copy)
    assert main(["inspect", str(copy.path)]) == 0
    told = capsys.readouterr().out
    assert "products read integers as they are stored, and quantize their inputs" in told
    assert "experts: the chosen ones compute; packed" in told
    assert report["form"] == {"products": "as stored", "experts": "packed"}
    for name, kinds in report["operators"].items():
        assert "MatMulNBits" in kinds, name
        assert "DequantizeLinear" not in kinds, name
    assert len(text(copy)) == 16
    standard = build(copy, "standard")
    assert standard["form"] == {"products": "expanded", "experts": ""}
    assert "DequantizeLinear" in standard["operators"]["denoiser"]
    assert PROBE_FILE not in load_engine_record(copy, "ort-cpu").files


def test_where_a_processor_mixes_rows_weights_are_expanded(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(copy)
    monkeypatch.setattr(ort_builder, "_products_compute_rows_alike", lambda: False)
    report = build(copy)
    assert report["form"]["products"] == "expanded", "another processor is another engine"
    assert "MatMulNBits" not in report["operators"]["context"]
    assert len(text(copy)) == 16


def test_an_engine_that_comes_to_such_a_processor_is_refused(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(copy)
    asked: list[bytes] = []

    def mixes(graph: bytes) -> bool:
        asked.append(graph)
        return False

    monkeypatch.setattr(ort_engine, "rows_are_alike", mixes)
    with pytest.raises(EngineMismatchError, match="another kind of processor") as caught:
        TwoTower.open(copy.path, target="ort-cpu")
    assert asked == [probe_graph()]
    assert "twotower build" in caught.value.do


def test_experts_are_packed_where_half_of_the_memory_holds_them(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(copy)["form"]["experts"] == "packed"
    size = sum(p.stat().st_size for p in engine_folder(copy, "ort-cpu").glob("*.data"))
    monkeypatch.setattr(ort_engine, "usable_memory", lambda: size // 2)
    with fails(EngineMismatchError, "too little here", do="--target ort-cpu"):
        TwoTower.open(copy.path, target="ort-cpu")
    monkeypatch.setattr(ort_builder, "usable_memory", lambda: size // 2)
    report = build(copy)
    assert report["form"]["experts"] == "mapped", "what does not fit is built again"
    assert len(text(copy)) == 16


def test_an_older_record_is_built_again(copy: Bundle) -> None:
    build(copy)
    path = engine_folder(copy, "ort-cpu") / BUILD_FILE
    record = json.loads(path.read_text())
    del record["report"]["form"]
    path.write_text(json.dumps(record))
    assert build(copy)["form"]["products"] == "as stored"
