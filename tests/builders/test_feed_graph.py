"""A graph with all it reads, for Polygraphy: the documented commands, word for word, and what is refused."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.processes import environment
from tests.helpers.source import ROOT
from twotower.builders.feed_graph import FeedOptions, feed_graph, main
from twotower.bundle import GRAPH_FILES, Bundle
from twotower.weights.external import load_graph


def run(folder: Path) -> dict[str, Any]:
    """What ONNX Runtime computes from what a folder feeds."""
    (feed,) = runpy.run_path(str(folder / "data.py"))["load_data"]()
    session = ort.InferenceSession(str(folder / "graph.onnx"), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(feed), (
        "nothing is missing, nothing is left over"
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


@pytest.mark.parametrize("name", GRAPH_FILES)
def test_every_graph_runs_on_what_is_fed_and_computes_numbers(
    hybrid_a: Bundle, tmp_path: Path, name: str
) -> None:
    feed_graph(hybrid_a, name, tmp_path / "fed", FeedOptions(max_context=256))
    outputs = run(tmp_path / "fed")
    assert set(outputs) == {spec.name for spec in hybrid_a.signatures[name].outputs}
    assert all(np.isfinite(value).all() for value in outputs.values())
    assert not any(
        t.external_data for t in onnx.load(str(tmp_path / "fed" / "graph.onnx")).graph.initializer
    )


def test_some_layers_are_a_graph_of_their_own(hybrid_a: Bundle, tmp_path: Path) -> None:
    words = [str(hybrid_a.path), "--graph", "context", "--layers", "1:3", "--max-context", "256"]
    assert main([*words, "-o", str(tmp_path / "fed")]) == 0
    assert "residual_out" in run(tmp_path / "fed")
    whole = load_graph(hybrid_a.graph_file("context"))
    assert len(load_graph(tmp_path / "fed" / "graph.onnx").graph.node) < len(whole.graph.node) / 2


def test_what_cannot_be_fed_is_said(
    hybrid_a: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(hybrid_a.path), "-o", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    half = export_fixture("hybrid-b", tmp_path / "b", "bfloat16")
    assert main([str(half.path), "-o", str(tmp_path / "fed")]) == 2
    said = capsys.readouterr().err
    assert "no bfloat16" in said
    assert "--dtype float16" in said
    assert not (tmp_path / "fed").exists()


def documented() -> list[str]:
    """The commands of docs/engines.md that need no GPU, as typed."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    section = text.split("## A graph that computes something else")[1]
    first = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert first is not None
    return first[1].strip().splitlines()


@pytest.mark.slow
@pytest.mark.trained
def test_the_documented_comparison_holds_word_for_word(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "bin").mkdir()
    for name, module in (("twotower", "twotower.cli.main"), ("polygraphy", "polygraphy.tools")):
        script = f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    paths = {"PATH": os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])}
    kept = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    commands = documented()
    programs = ["twotower", "python", "polygraphy", "polygraphy"]
    assert [shlex.split(c)[0] for c in commands] == programs
    for command in commands:
        done = subprocess.run(command, shell=True, env={**environment(), **paths}, **kept)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "All outputs matched" in done.stdout
