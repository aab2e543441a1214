"""`twotower inspect`, `export` and `build` as they are typed, on what is sound and on what is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.errors import check_error
from tests.helpers.graph_faults import FAULTS
from tests.helpers.graphs import FIXTURES
from twotower.cli.main import main

SOURCE = FIXTURES / "hybrid-a"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that a test may damage, in a folder of its own."""
    return Path(shutil.copytree(SOURCE, tmp_path / "in" / "checkpoint"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_inspect_describes_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(SOURCE)]) == 0
    text = capsys.readouterr().out
    assert main(["inspect", str(SOURCE), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "checkpoint"
    index = json.loads((SOURCE / INDEX).read_text())
    assert (facts["tensors"], facts["shards"]) == (len(index["weight_map"]), 2)
    assert str(len(index["weight_map"])) in text
    assert f"twotower export {SOURCE}" in text


def test_inspect_describes_a_bundle(built_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built_bundle), "--verify"]) == 0
    text = capsys.readouterr().out
    assert main(["inspect", str(built_bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["tokenizer"], facts["trained_block_size"]) == ("bundle", False, 16)
    assert facts["engines"]["ort-cpu"] == "built, fits this machine"
    assert "token ids only" in text
    assert "ort-cpu: built" in text


@pytest.mark.slow
def test_export_and_build_say_what_they_made_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    assert (
        main(["export", str(SOURCE), "-o", str(output), "--dtype", "bfloat16", "--block-size", "8"])
        == 0
    )
    err = capsys.readouterr().err
    assert "verified: " in err
    assert f"next: twotower build {output}" in err
    before = sorted(p for p in output.rglob("*"))
    assert main(["build", str(output), "--dry-run"]) == 0
    assert "onnxruntime" in capsys.readouterr().out
    assert sorted(output.rglob("*")) == before
    assert main(["build", str(output), "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["library"]["name"] == "onnxruntime"
    assert f"{output}/engines/ort-cpu: " in captured.err
    assert main(["inspect", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trained_block_size"] == 8


def test_an_unverified_export_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(SOURCE), "-o", str(tmp_path / "bundle"), "--no-verify"]) == 0
    assert "not verified: not asked for" in capsys.readouterr().err


def damage_checkpoint(folder: Path, damage: str) -> None:
    shard = folder / SECOND
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    if damage == "missing tensor":
        del tensors[name]
        save_file(tensors, shard)
    elif damage == "extra tensor":
        edit_json(
            folder / INDEX,
            weight_map={
                **json.loads((folder / INDEX).read_text())["weight_map"],
                "backbone.extra": SECOND,
            },
        )
        save_file({**tensors, "backbone.extra": tensors[name]}, shard)
    elif damage == "mis-shaped tensor":
        save_file({**tensors, name: tensors[name].reshape(-1)[:-1].copy()}, shard)
    elif damage == "truncated shard":
        os.truncate(shard, shard.stat().st_size - 100)
    elif damage == "corrupt shard":
        shard.write_bytes(b"\xff" * 64)
    elif damage == "missing file":
        shard.unlink()
    elif damage == "unknown letter":
        pattern = json.loads((folder / "config.json").read_text())["hybrid_override_pattern"]
        edit_json(folder / "config.json", hybrid_override_pattern="Q" + pattern[1:])
    elif damage == "no config":
        (folder / "config.json").unlink()


DAMAGES = {
    "missing tensor": "does not hold it",
    "extra tensor": "backbone.extra",
    "mis-shaped tensor": "shape",
    "truncated shard": SECOND,
    "corrupt shard": SECOND,
    "missing file": SECOND,
    "unknown letter": "'Q'",
    "no config": "config.json",
}


@pytest.mark.parametrize("verb", ["inspect", "export"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, damage: str
) -> None:
    damage_checkpoint(checkpoint, damage)
    output = tmp_path / "out" / "bundle"
    assert main([verb, str(checkpoint), *(["-o", str(output)] if verb == "export" else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    check_error(captured.err, DAMAGES[damage])
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "owner/model/more", "/dev/null/x"])
def test_checkpoints_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["export", name, "-o", str(tmp_path / "bundle")]) == 2
    check_error(capsys.readouterr().err, name)
    assert not list(tmp_path.iterdir())


def test_an_export_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "dear").write_text("diary")
    assert main(["export", str(SOURCE), "-o", str(tmp_path / "bundle")]) == 2
    check_error(capsys.readouterr().err, "exists already")
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["diary"]


def test_block_sizes_no_denoiser_was_trained_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(SOURCE), "-o", str(tmp_path / "bundle"), "--block-size", "0"]) == 2
    check_error(capsys.readouterr().err, "block")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("folder", "target", "what"),
    [("b", "toaster", "toaster"), ("nowhere", "ort-cpu", "nowhere"), ("in", "ort-cpu", "in")],
)
def test_builds_that_cannot_be(
    checkpoint: Path,
    built_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    target: str,
    what: str,
) -> None:
    shutil.copytree(built_bundle, tmp_path / "b")
    before = sorted(tmp_path.rglob("*"))
    assert main(["build", str(tmp_path / folder), "--target", target]) == 2
    check_error(capsys.readouterr().err, what)
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_of_a_graph_lists_what_tensorrt_would_do_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = tmp_path / "bad.onnx", tmp_path / "good.onnx"
    onnx.save(FAULTS["attention-causal"](True), bad)
    onnx.save(FAULTS["attention-float32"](True), good)
    assert main(["inspect", str(bad)]) == 1
    assert "attention-causal" in capsys.readouterr().out
    assert main(["inspect", str(good)]) == 0, "a note is no error"
    assert "attention-float32" in capsys.readouterr().out
    assert main(["inspect", str(bad), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["opset"], facts["operators"]) == ("graph", 24, 1)
    assert [(f["rule"], f["severity"]) for f in facts["findings"]] == [
        ("attention-causal", "error")
    ]


@pytest.mark.parametrize("content", [b"", b"\xff" * 300, None])
def test_inspect_of_a_file_that_is_no_graph(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "graph.onnx"
    if content is not None:
        file.write_bytes(content)
    assert main(["inspect", str(file)]) == 2
    check_error(capsys.readouterr().err, str(file))


def test_inspect_of_an_exported_graph_is_clean(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(built_bundle / "denoiser" / "model.onnx")]) == 0
    assert "no issues found" in capsys.readouterr().out
