"""The check for `polygraphy debug reduce`, and what a failed build leaves for it: from the refusal to the refused node."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.processes import environment
from tests.helpers.trt.install import install_fake, one_node
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.trt import engine_plan
from twotower.builders.try_graph import BUILDS, NOT_TRIED, REFUSED, job_of_graph, main
from twotower.bundle import Bundle
from twotower.errors import BuildError
from twotower.weights.external import load_graph

CULPRIT = "planted/top_k"


def plant_top_k(bundle: Bundle) -> None:
    """Adds to the logits of the context head the least of the 4096 best of something wide: TensorRT takes 3840 at most."""
    file = bundle.graph_file("context_head")
    model = load_graph(file)
    nodes = list(model.graph.node)
    index = next(i for i, node in reversed(list(enumerate(nodes))) if node.op_type == "MatMul")
    logits = nodes[index].output[0]
    for node in nodes[index + 1 :]:
        node.input[:] = ["planted" if name == logits else name for name in node.input]
    make, constant = onnx.helper.make_node, onnx.helper.make_tensor
    best = ["planted.values", "planted.ids"]
    planted = [
        make("Tile", [logits, "planted.times"], ["planted.wide"], name="planted/tile"),
        make("TopK", ["planted.wide", "planted.k"], best, name=CULPRIT),
        make("ReduceMin", [best[0], "planted.axis"], ["planted.least"], name="planted/least"),
        make("Add", [logits, "planted.least"], ["planted"], name="planted/add"),
    ]
    model.graph.initializer.extend(
        constant(f"planted.{name}", onnx.TensorProto.INT64, [len(values)], values)
        for name, values in (("times", [1, 128]), ("k", [4096]), ("axis", [1]))
    )
    del model.graph.node[:]
    model.graph.node.extend([*nodes[: index + 1], *planted, *nodes[index + 1 :]])
    file.write_bytes(model.SerializeToString())


def small(folder: Path, operator: str = "Relu") -> Path:
    return one_node(folder, operator, onnx.TensorProto.FLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "code"),
    [
        ("Relu", BUILDS),
        ("Refuse", REFUSED),
        ("RefuseBuild", REFUSED),
        ("Crash", REFUSED),
        ("Raise", NOT_TRIED),
    ],
)
def test_the_exit_code_tells(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    operator: str,
    code: int,
) -> None:
    install_fake(tmp_path, monkeypatch)
    assert main([str(small(tmp_path, operator)), "--target", "trt", "--axes", "B=2"]) == code
    assert (capfd.readouterr().err == "") == (code == BUILDS)


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_what_is_no_graph_is_not_tried(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "g.onnx").write_bytes(content)
    code = main([str(tmp_path / "g.onnx")])
    assert code == NOT_TRIED


def test_a_part_of_a_graph_has_axes_of_its_own(tmp_path: Path) -> None:
    graph = load_graph(small(tmp_path))
    given = {
        "inputs": [["x", "float16", ["B", 4]]],
        "profiles": [{"name": "p", "axes": {"B": [1, 8, 8]}}],
        "sms": [86],
        "dtype": "float16",
    }
    assert job_of_graph(graph, "rtx", given, axes={})["profiles"] == given["profiles"], (
        "the very graph: its own shapes"
    )
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "unk__0"
    part = job_of_graph(graph, "rtx", given, axes={})
    assert part["inputs"] == [["x", "float16", ["B", "unk__0"]]]
    assert part["profiles"] == [{"name": "whole", "axes": {"B": [1, 1, 1], "unk__0": [1, 1, 1]}}], (
        "equal axes cannot differ"
    )
    graph.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ValueError, match="'x'"):
        job_of_graph(graph, "rtx", given, axes={})


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    kept = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(words, cwd=folder, env=environment(), **kept)


def polygraphy(command: str) -> list[str]:
    """A command as the error shows it, with the polygraphy and the Python of this environment."""
    words = shlex.split(command)
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    return [
        sys.executable,
        "-c",
        code,
        *(sys.executable if word == "python" else word for word in words[1:]),
    ]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildError]:
    """The folder and the error of a build with a planted operator; the graph rules, which know it, look away."""
    bundle = export_fixture("hybrid-b", tmp_path_factory.mktemp("failed") / "b", "float16")
    plant_top_k(bundle)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BuildError) as caught:
        patch.setattr(engine_plan, "require_clean", lambda *_, **__: ())
        config = BuildConfig(sms=(86, 89), max_context=256, experts="dense")
        build_engines(bundle, "rtx", builder_for("rtx"), config=config)
    return bundle.path / "engines" / ".failed" / "rtx-context_head", caught.value


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_the_kept_graph_fails_elsewhere_for_the_same_reason(
    failed: tuple[Path, BuildError], tmp_path: Path
) -> None:
    folder, error = failed
    assert "exceeds the maximum value allowed (3840)" in error.found
    lines = (folder / "README.md").read_text().splitlines()
    check = next(line for line in lines if "twotower.builders.try_graph" in line)
    copy = shutil.copytree(folder, tmp_path / "copy")  # with the weights: it needs no bundle
    done = run([sys.executable, *shlex.split(check)[1:]], copy)
    assert done.returncode == REFUSED
    assert "3840" in done.stderr
    assert any("3840" in line["message"] for line in json.loads((folder / "log.json").read_text()))


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_polygraphy_shows_the_kept_graph(failed: tuple[Path, BuildError]) -> None:
    pytest.importorskip("polygraphy")
    folder, error = failed
    done = run(polygraphy(commands(error)[0]), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert CULPRIT in done.stdout


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_polygraphy_reduces_the_kept_graph_to_the_node_that_is_refused(
    failed: tuple[Path, BuildError],
) -> None:
    """The command of the error, word for word."""
    pytest.importorskip("polygraphy")
    pytest.importorskip("onnx_graphsurgeon")
    folder, error = failed
    done = run(polygraphy(commands(error)[1]), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    nodes: list[Any] = list(load_graph(folder / "reduced.onnx").graph.node)
    assert CULPRIT in [node.name for node in nodes]
    assert len(nodes) <= 3, "of some twenty"


def commands(error: BuildError) -> list[str]:
    """The commands between backticks, the change of folder left out."""
    return [c for c in re.findall(r"`([^`]+)`", error.do) if c.startswith("polygraphy")]
