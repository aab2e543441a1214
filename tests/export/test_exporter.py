"""Files say what the checkpoint says, appear whole or not at all; verification finds faults."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from tests.helpers.bundles import fresh_export
from tests.helpers.errors import fails
from tests.helpers.graphs import FIXTURES, fixture_weights
from tests.helpers.processes import environment
from tests.helpers.source import ROOT
from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, REPORT_FILE
from twotower.errors import CheckpointError, ConfigError, ExportError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.export import exporter as exporter_module
from twotower.export import verify as verify_module
from twotower.export.verify import layers_that_fit, verify_bundle
from twotower.weights.external import load_graph, weight_refs
from twotower.weights.mapped import read_weight

TOKENIZER = ROOT / "assets" / "twotower-tiny" / "tokenizer.json"

DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_files_hold_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    bundle = fresh_export("hybrid-a", tmp_path / "b", dtype)
    tensors = fixture_weights(FIXTURES / "hybrid-a")
    seen = set()
    for relative in GRAPH_FILES.values():
        onnx.checker.check_model(str(bundle.path / relative))
        data = np.fromfile(bundle.path / (relative + DATA_SUFFIX), np.uint8)
        for name, ref in weight_refs(load_graph(bundle.path / relative)).items():
            got = read_weight(data, ref)
            seen.add(name)
            want = exported(name, tensors, bundle.config.n_routed_experts)
            assert got.size == want.size, name
            tolerance = 1e-2 if dtype == "bfloat16" else 1e-3
            tolerance = 1e-6 if name.endswith(".negated_exp") else tolerance
            np.testing.assert_allclose(got.reshape(want.shape), want, rtol=tolerance, atol=1e-6)
    changed = ("A_log", "conv1d.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")
    plain = {n for n in tensors if ".experts." not in n and not n.endswith(changed)}
    assert plain <= seen


def exported(name: str, tensors: dict[str, np.ndarray], experts: int) -> np.ndarray:
    """What a weight of a graph holds, by its name; other shapes of the same numbers are free."""
    if name.endswith(".negated_exp"):
        return -np.exp(tensors[name.removesuffix(".negated_exp")])
    if name.endswith(".transposed"):
        return np.moveaxis(tensors[name.removesuffix(".transposed")], -1, 0)
    if name.endswith(".qkv_proj.weight"):
        return np.concatenate([tensors[name.replace("qkv", part)] for part in "qkv"])
    if ".experts." in name:
        stem, _, kind = name.rpartition("experts.")
        return np.stack([tensors[f"{stem}experts.{j}.{kind}"] for j in range(experts)])
    return tensors[name]


def test_same_checkpoint_same_bundle(tmp_path: Path) -> None:
    one, two = (fresh_export("hybrid-b", tmp_path / name) for name in "ab")
    assert one.files == two.files


def test_plain_onnxruntime_opens_the_files(tmp_path: Path) -> None:
    """No loader of ours is needed: the standard dialect with standard external data."""
    import onnxruntime as ort

    bundle = fresh_export("hybrid-b", tmp_path / "b")
    for relative in GRAPH_FILES.values():
        ort.InferenceSession(str(bundle.path / relative), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_export_verifies_itself(tmp_path: Path, folder: str, dtype: str) -> None:
    calls: list[tuple[str, int, int]] = []
    bundle = export_bundle(
        Checkpoint.open(FIXTURES / folder),
        tmp_path / "b",
        ExportConfig(dtype=dtype),
        verify=verify_bundle,
        report=lambda what, done, total: calls.append((what, done, total)),
    )
    report = json.loads((bundle.path / REPORT_FILE).read_text())
    assert report["verified"]
    assert report["largest_error"] < 1e-4
    outputs = {o.name for signature in bundle.signatures.values() for o in signature.outputs}
    assert outputs <= set(report["errors"]), "every output is compared"
    written = [done for what, done, total in calls if what == "writing weights" and total]
    assert written == sorted(written)
    assert written[-1] == next(total for what, _, total in calls if what == "writing weights")


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", ["context/model.onnx.data", "context/head.onnx.data", "denoiser/model.onnx.data"]
)
def test_verification_finds_a_changed_weight(tmp_path: Path, which: str) -> None:
    def spoiled(folder: Path, *rest: Any) -> dict[str, Any]:
        data = np.fromfile(folder / which, np.float32)
        data[-500:] += 1.0
        data.tofile(folder / which)
        return verify_bundle(folder, *rest)

    with pytest.raises(ExportError, match="do not compute"):
        export_bundle(Checkpoint.open(FIXTURES / "hybrid-a"), tmp_path / "b", verify=spoiled)
    assert list(tmp_path.iterdir()) == []


def test_a_model_too_large_is_verified_on_the_first_layer_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(FIXTURES / "hybrid-a")
    whole = verify_module.peak_bytes(checkpoint.config)
    assert layers_that_fit(checkpoint.config, whole)[0] == (0, 1, 3)
    assert layers_that_fit(checkpoint.config, 2 * whole)[0] == tuple(range(8))
    assert layers_that_fit(checkpoint.config, 1000)[0] == ()
    first = "the first layer of each kind only, 0 (M), 1 (E), 3 (*)"
    for memory, layers in ((whole, first), (1000, None)):
        monkeypatch.setattr(verify_module, "available_memory", lambda memory=memory: memory)
        bundle = export_bundle(checkpoint, tmp_path / str(memory), verify=verify_bundle)
        report = json.loads((bundle.path / REPORT_FILE).read_text())
        assert report["verified"] is (layers is not None)
        assert (layers or "takes") in report.get("layers", report.get("why"))


def test_small_disk_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match="disk space"):
        fresh_export("hybrid-b", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_terminated_export_leaves_nothing(tmp_path: Path) -> None:
    """By the command; test_killed.py kills it outright."""
    script = (
        "import sys, time\nfrom twotower.export import exporter\n"
        "def slow(*a, **k):\n    print('writing', flush=True); time.sleep(60)\n"
        "exporter.stream_weights = slow\nfrom twotower.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["export", str(FIXTURES / "hybrid-b"), "-o", str(tmp_path / "b"), "--no-verify"]
    command = [sys.executable, "-c", script, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_running_neighbour_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".b.partial.{os.getppid()}"
    other.mkdir()
    fresh_export("hybrid-b", tmp_path / "b")
    assert other.exists()


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    name = "denoiser_tower.layers.0.mixer.in_proj.weight"
    tensors = fixture_weights(FIXTURES / "hybrid-b")
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = 1e5
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((FIXTURES / "hybrid-b" / "config.json").read_bytes())
    with fails(ExportError, name, found="100000", do="bfloat16"):
        export_bundle(Checkpoint.open(source), tmp_path / "b", ExportConfig(dtype="float16"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{}", "is not a tokenizer"),
        (TOKENIZER.read_bytes()[:-100], "is not a tokenizer"),
        (b"<html>404</html>", "is not a tokenizer"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_a_damaged_tokenizer_is_refused_before_anything_is_written(
    tmp_path: Path, content: bytes, what: str
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "hybrid-b", source)
    (source / "tokenizer.json").write_bytes(content)
    with fails(CheckpointError, what, what="tokenizer.json"):
        export_bundle(Checkpoint.open(source), tmp_path / "out" / "b")
    assert not (tmp_path / "out").exists()


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        ExportConfig(dtype="int8")


def test_a_failed_export_does_not_hash_the_rest_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing 118 GB takes minutes; the error comes at once."""
    failed, seen = Event(), []

    def identity(self: Checkpoint, tick: Any) -> Any:
        failed.wait(60)
        for number in range(1000):
            time.sleep(0.001)
            seen.append(number)
            tick(1)
        return {}

    def full(*args: Any, **options: Any) -> Any:
        failed.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Checkpoint, "identity", identity)
    monkeypatch.setattr(exporter_module, "stream_weights", full)
    with pytest.raises(ExportError, match="failed while writing"):
        fresh_export("hybrid-b", tmp_path / "b")
    assert len(seen) < 1000
    assert not list(tmp_path.iterdir())


def test_a_graph_that_breaks_a_rule_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that TensorRT would compute wrongly is found before a byte of weights is written."""
    recorded = exporter_module.build_graph

    def harmed(name: str, *rest: Any) -> Any:
        graph = recorded(name, *rest)
        for node in graph.model.graph:
            if node.op_type == "Attention":
                node.attributes.add(ir.AttrInt64("is_causal", 1))
        return graph

    monkeypatch.setattr(exporter_module, "build_graph", harmed)
    monkeypatch.setattr(
        exporter_module, "stream_weights", lambda *_, **__: pytest.fail("weights are written")
    )
    places = ("layers.3.attention/Attention", "layers.7.attention/Attention")
    said = ("attention-causal", *places)
    with fails(ExportError, what="context", found=said, do="defect of twotower"):
        fresh_export("hybrid-a", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "rules"), [("float32", {"attention-float32"}), ("bfloat16", set())]
)
def test_notes_on_the_graphs_are_in_the_report(tmp_path: Path, dtype: str, rules: set[str]) -> None:
    bundle = fresh_export("hybrid-a", tmp_path / "b", dtype)
    notes = json.loads((bundle.path / REPORT_FILE).read_text())["notes"]
    assert {(note["graph"], note["rule"]) for note in notes} == {
        ("context", rule) for rule in rules
    }
