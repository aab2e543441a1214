"""Polygraphy on an exported graph as docs/gpu shows it, on a CPU and against TensorRT."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.graphs import FIXTURES
from tests.helpers.source import ROOT
from twotower.cli.main import main

WIDTH = 64  # of hybrid-a
Build = Callable[[str, str, str], Path]


def documented() -> list[str]:
    """The command of the document."""
    lines = (ROOT / "docs" / "gpu" / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("polygraphy run"))
    return shlex.split(line)[1:]


def run(words: list[str], bundle: Path) -> subprocess.CompletedProcess[str]:
    words = [word.replace("bundle/", f"{bundle}/").replace("2688", str(WIDTH)) for word in words]
    command = [str(Path(sys.executable).with_name("polygraphy")), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.trt_rtx
def test_the_documented_command_runs_on_a_cpu_but_for_tensorrt(tmp_path: Path) -> None:
    assert (
        main(["export", str(FIXTURES / "hybrid-a"), "-o", str(tmp_path / "b"), "--no-verify"]) == 0
    )
    words = [word for word in documented() if word != "--trt"]
    done = run(words, tmp_path / "b")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


@pytest.mark.gpu
@pytest.mark.trt
def test_tensorrt_and_onnx_runtime_agree(built_for: Build) -> None:
    done = run(documented(), built_for("hybrid-a", "float32", "trt"))
    assert done.returncode == 0, done.stdout + done.stderr
