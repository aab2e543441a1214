"""`twotower inspect`, `export` and `build` as they are typed, on sound and on damaged input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.commands import Commands
from tests.helpers.graph_faults import FAULTS
from tests.helpers.graphs import FIXTURES

SOURCE = FIXTURES / "hybrid-a"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy that a test may damage, in a folder of its own."""
    return Path(shutil.copytree(SOURCE, tmp_path / "in" / "checkpoint"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_inspect_describes_a_checkpoint(cli: Commands) -> None:
    text, facts = cli("inspect", SOURCE).out, cli.json("inspect", SOURCE)
    assert facts["kind"] == "checkpoint"
    index = json.loads((SOURCE / INDEX).read_text())
    assert (facts["tensors"], facts["shards"]) == (len(index["weight_map"]), 2)
    assert str(len(index["weight_map"])) in text
    assert f"twotower export {SOURCE}" in text


def test_inspect_describes_a_bundle(built_bundle: Path, cli: Commands) -> None:
    text, facts = cli("inspect", built_bundle, "--verify").out, cli.json("inspect", built_bundle)
    assert (facts["kind"], facts["tokenizer"], facts["trained_block_size"]) == ("bundle", False, 16)
    assert facts["engines"]["ort-cpu"] == "built, fits this machine"
    assert "token ids only" in text
    assert "ort-cpu: built" in text


@pytest.mark.slow
def test_export_and_build_say_what_they_made_and_what_is_next(
    tmp_path: Path, cli: Commands
) -> None:
    output = tmp_path / "bundle"
    err = cli("export", SOURCE, "-o", output, "--dtype bfloat16 --block-size 8").err
    assert "verified: " in err
    assert f"next: twotower build {output}" in err
    before = sorted(p for p in output.rglob("*"))
    assert "onnxruntime" in cli("build", output, "--dry-run").out
    assert sorted(output.rglob("*")) == before
    out, err = cli("build", output, "--json")
    assert json.loads(out)["library"]["name"] == "onnxruntime"
    assert f"{output}/engines/ort-cpu: " in err
    assert cli.json("inspect", output)["trained_block_size"] == 8


def change_tensors(folder: Path, change: Callable[[dict[str, Any], str], object]) -> None:
    """Writes a shard again after a change of its tensors, which gets the name of the first."""
    tensors = load_file(folder / SECOND)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, folder / SECOND)


def extra_tensor(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**places, "backbone.extra": SECOND})
    change_tensors(folder, lambda t, name: t.update({"backbone.extra": t[name]}))


def reshaped(tensors: dict[str, Any], name: str) -> None:
    tensors[name] = tensors[name].reshape(-1)[:-1].copy()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda f: change_tensors(f, dict.pop), "does not hold it"),
    "extra tensor": (extra_tensor, "backbone.extra"),
    "mis-shaped tensor": (lambda f: change_tensors(f, reshaped), "shape"),
    "truncated shard": (lambda f: os.truncate(f / SECOND, 5000), SECOND),
    "corrupt shard": (lambda f: (f / SECOND).write_bytes(b"\xff" * 64), SECOND),
    "missing file": (lambda f: (f / SECOND).unlink(), SECOND),
    "unknown letter": (
        lambda f: edit_json(f / "config.json", hybrid_override_pattern="QEM*EME*"),
        "'Q'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("verb", ["inspect", "export"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, cli: Commands, verb: str, damage: str
) -> None:
    spoil, what = DAMAGES[damage]
    spoil(checkpoint)
    output = tmp_path / "out" / "bundle"
    words = f"-o {output}" if verb == "export" else ""
    cli.refused(verb, checkpoint, words, what=what)
    assert not output.parent.exists() or not list(output.parent.iterdir())


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("nowhere", "nowhere"),
        ("./nowhere", "./nowhere"),
        ("owner/model/more", "owner/model/more"),
        ("/dev/null/x", "/dev/null/x"),
        (f"{SOURCE} --block-size 0", "block"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, cli: Commands, words: str, what: str) -> None:
    cli.refused("export", words, "-o", tmp_path / "bundle", what=what)
    assert not list(tmp_path.iterdir())


def test_an_export_never_overwrites(tmp_path: Path, cli: Commands) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "dear").write_text("diary")
    cli.refused("export", SOURCE, "-o", tmp_path / "bundle", what="exists already")
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["diary"]


@pytest.mark.parametrize(
    ("folder", "target", "what"),
    [("b", "toaster", "toaster"), ("nowhere", "ort-cpu", "nowhere"), ("in", "ort-cpu", "in")],
)
def test_builds_that_cannot_be(
    built_bundle: Path, tmp_path: Path, cli: Commands, folder: str, target: str, what: str
) -> None:
    shutil.copytree(built_bundle, tmp_path / "b")
    shutil.copytree(SOURCE, tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    cli.refused("build", tmp_path / folder, "--target", target, what=what)
    assert sorted(tmp_path.rglob("*")) == before


def test_inspect_of_a_graph_lists_what_tensorrt_would_do_wrongly(
    built_bundle: Path, tmp_path: Path, cli: Commands
) -> None:
    bad, good = tmp_path / "bad.onnx", tmp_path / "good.onnx"
    onnx.save(FAULTS["attention-causal"](True), bad)
    onnx.save(FAULTS["attention-float32"](True), good)
    assert "attention-causal" in cli("inspect", bad, code=1).out
    assert "attention-float32" in cli("inspect", good).out, "a note is no error"
    facts = cli.json("inspect", bad, code=1)
    assert (facts["kind"], facts["opset"], facts["operators"]) == ("graph", 24, 1)
    (finding,) = facts["findings"]
    assert (finding["rule"], finding["severity"]) == ("attention-causal", "error")
    exported = built_bundle / "denoiser" / "model.onnx"
    assert "no issues found" in cli("inspect", exported).out


@pytest.mark.parametrize("content", [b"", b"\xff" * 300, None])
def test_inspect_of_a_file_that_is_no_graph(
    content: bytes | None, tmp_path: Path, cli: Commands
) -> None:
    file = tmp_path / "graph.onnx"
    if content is not None:
        file.write_bytes(content)
    cli.refused("inspect", file, what=str(file))
