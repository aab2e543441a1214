"""A build in a process of its own: what becomes of its words, its crash, and a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.errors import fails
from tests.helpers.processes import child_of, environment, is_gone
from tests.helpers.trt.install import install_fake, one_node
from twotower.builders.base import silent
from twotower.builders.trt.make_engine import RefusedError, run_job
from twotower.errors import BuildAbortedError


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch)


def job(folder: Path, operator: str = "Relu", output: str | None = None) -> dict[str, Any]:
    file = str(one_node(folder, operator, onnx.TensorProto.FLOAT))
    return {
        "target": "trt",
        "graph": file,
        "beside": file,
        "output": output or str(folder / "out.engine"),
        "inputs": [["x", "float32", ["B", 4]]],
        "profiles": [{"name": "whole", "axes": {"B": [1, 2, 2]}}],
        "sms": [],
        "dtype": "float32",
        "timing_cache": str(folder / "timing"),
    }


def test_progress_and_facts_come_back(tmp_path: Path) -> None:
    ticks: list[tuple[str, int, int]] = []
    facts = run_job(job(tmp_path), tmp_path, tick=lambda *words: ticks.append(words))
    assert ticks == [("Building", step + 1, 10) for step in range(10)]
    assert (facts["layers"], facts["layers_from"], facts["log"]) == (1, "walk", [])
    assert facts["bytes"] == (tmp_path / "out.engine").stat().st_size
    assert facts["peak_memory"] > 10**7
    assert facts["parse_seconds"] >= 0
    assert facts["build_seconds"] >= 0
    assert "why_not" in facts["inspector"]


@pytest.mark.parametrize(
    ("operator", "found"),
    [("Refuse", "no importer"), ("RefuseBuild", "no kernel"), ("Crash", "SIGSEGV")],
)
def test_a_refusal_is_told_from_a_want(tmp_path: Path, operator: str, found: str) -> None:
    with fails(RefusedError, found=found) as caught:
        run_job(job(tmp_path, operator), tmp_path, tick=silent)
    assert isinstance(caught.value, BuildAbortedError) == (operator == "Crash")


def test_an_inspector_that_dies_costs_no_engine_and_says_why(tmp_path: Path) -> None:
    broken = "from twotower.builders.trt import engine_inspector\n"
    broken += "def inspect(*_, **__): raise ValueError('an odd program')\n"
    broken += "engine_inspector.inspect_plan = inspect\n"
    (tmp_path / "site" / "sitecustomize.py").write_text(broken)
    facts = run_job(job(tmp_path), tmp_path, tick=silent)
    assert facts["bytes"] == (tmp_path / "out.engine").stat().st_size
    assert facts["inspector"] == {
        "why_not": "the process died while it looked; ValueError: an odd program"
    }


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="the system has no device that is always full"
)
def test_a_full_disk_is_no_fault_of_the_graph(tmp_path: Path) -> None:
    with pytest.raises(BuildAbortedError, match="could not be written") as caught:
        run_job(job(tmp_path, output="/dev/full"), tmp_path, tick=silent)
    assert not isinstance(caught.value, RefusedError)
    assert "No space left" in caught.value.found
    assert "free disk space" in caught.value.do


def test_a_want_of_memory_says_how_to_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's killer sends SIGKILL; here the tick does."""
    monkeypatch.setenv("FAKE_TENSORRT_SECONDS", "5")

    def kill(*words: Any) -> None:
        for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            if "twotower.builders.trt.child" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(int(pid), 9)

    with fails(BuildAbortedError, "died", found="SIGKILL", do="--max-build-memory"):
        run_job(job(tmp_path), tmp_path, tick=kill)


def test_a_timing_cache_that_cannot_be_kept_is_a_warning(tmp_path: Path) -> None:
    asked = {**job(tmp_path), "timing_cache": str(tmp_path / "nowhere" / "timing")}
    facts = run_job(asked, tmp_path, tick=silent)
    (line,) = facts["log"]
    assert "timing cache is not kept" in line["message"]
    assert line["explained"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the closed pipe ends it, a step later"
)
def test_a_build_dies_with_a_parent_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: a step takes 20 seconds here, so that the closed pipe is not what ends it."""
    monkeypatch.setenv("FAKE_TENSORRT_SECONDS", "200")
    code = (
        "import json, sys; from pathlib import Path; from twotower.builders.trt.make_engine import run_job\n"
        "run_job(json.loads(sys.argv[1]), Path(sys.argv[2]), tick=lambda *words: None)"
    )
    words = [sys.executable, "-c", code, json.dumps(job(tmp_path)), str(tmp_path)]
    parent = subprocess.Popen(words, env=environment())
    child = child_of(parent.pid)
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    assert is_gone(child)


@pytest.mark.slow
def test_an_error_of_the_caller_ends_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_SECONDS", "10")

    def stop(*words: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job(tmp_path), tmp_path, tick=stop)
    pid = json.loads((tmp_path / "job.json").read_text())["parent"]
    assert pid == os.getpid()
    left = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert not [
        c for c in left if "twotower.builders.trt.child" in Path(f"/proc/{c}/cmdline").read_text()
    ]
