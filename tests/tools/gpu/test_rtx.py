"""A trial says every step, here with the torch engine; the section reads it however it ends."""

from __future__ import annotations

import json
import lzma
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeCuda
from tools.gpu import rtx, rtx_setup
from tools.gpu.library import split_file
from tools.gpu.plans import PlanOptions, build_plan, make_logger
from tools.gpu.questions import Given
from tools.gpu.recorded import product_pass, write_pass
from tools.gpu.rtx_trial import Trial, fixed_shapes, plan_file, try_plan
from tools.gpu.torch_engine import HEADER, TorchTensorRT
from twotower.doctor import Answers, SkipSectionError
from twotower.runtime.cuda.calls import Cuda

Tried = Callable[..., tuple[bool, dict[str, Any]]]


@pytest.fixture
def tried(tmp_path: Path) -> Tried:
    """Tries the product on the fake; `spoil` changes the folder before."""
    write_pass(tmp_path, "product", product_pass())
    trial = Trial(tmp_path, "product", "default")
    plan_file(trial).write_bytes(lzma.compress(HEADER + product_pass().graph))

    def run(spoil: Callable[[Path], None] = lambda folder: None) -> Any:
        api, said = FakeCuda(), {}
        trt = TorchTensorRT("cpu", api)
        spoil(tmp_path)
        done = try_plan(trt, Cuda(api), trial, lambda name, value: said.update({name: value}))
        json.dumps(said)
        return done, said

    return run


def test_a_sound_plan_comes_to_the_end(tried: Tried) -> None:
    done, said = tried()
    assert done
    assert said["step"] == "done"
    assert all(said[k] for k in ("bound", "enqueued", "right", "captured", "replay_right"))
    assert said["ms_a_run"] >= 0


def test_wrong_numbers_are_seen(tried: Tried) -> None:
    def spoil(folder: Path) -> None:
        data = dict(np.load(folder / "product.npz"))
        data["out.y"][2, 3] += 1
        np.savez(folder / "product.npz", **data)

    done, said = tried(spoil)
    assert (done, said["right"], said["replay_right"]) == (True, False, False)


def test_a_plan_that_does_not_load_ends_there(tried: Tried) -> None:
    def spoil(folder: Path) -> None:
        (folder / "product.default.plan.xz").write_bytes(lzma.compress(b"another library's"))

    done, said = tried(spoil)
    assert (done, said["step"], said["deserialized"]) == (False, "deserialize", False)


@pytest.mark.trt_rtx
def test_plans_are_built_without_a_gpu() -> None:
    import tensorrt_rtx as trt

    lines: list[str] = []
    one = product_pass()
    logger = make_logger(trt, lines.append)
    shapes = fixed_shapes({"x": (4, 64)})
    for capability in ("default", "SM80"):
        options = PlanOptions(capability=capability, profiles=(shapes,))
        assert build_plan(trt, logger, one.graph, options), lines
    with pytest.raises(RuntimeError):
        build_plan(trt, logger, b"no graph", options)


SCRIPT = """
import json, sys, time
folder, case, capability = sys.argv[1:]
print(json.dumps({"step": "import"}), flush=True)
print("a line of the library's", flush=True)
print(json.dumps({"log": "ERROR: no such GPU"}), flush=True)
if capability == "CURRENT":
    sys.exit("no builder")
if capability == "SM80":
    time.sleep(60)
print(json.dumps({"step": "done", "right": True, "replay_right": True, "ms_a_run": 0.5}))
"""


def test_the_section_survives_every_end_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rtx").mkdir()
    (tmp_path / "trial.py").write_text(SCRIPT)
    monkeypatch.setattr(rtx, "COMMAND", (sys.executable, str(tmp_path / "trial.py")))
    monkeypatch.setattr(rtx, "_TRIAL_SECONDS", 1.0)
    monkeypatch.setattr(rtx, "library_site", lambda given: None)
    answers = Answers(tmp_path / "answers.json", 60)
    rtx.ask(answers, Given(name="rtx", pack=(tmp_path,), work=tmp_path))
    assert answers["runs"] == {"default": True, "CURRENT": False, "SM80": False}
    assert answers["product CURRENT"]["error"] == "no builder"
    assert answers["product SM80"]["error"] == "no answer in time"
    assert answers["product SM80"]["log"] == ["a line of the library's", "ERROR: no such GPU"]
    rows = answers["tables"][0]["rows"]
    first, later = rows[:-2], rows[-2:]
    assert [row[:2] for row in first] == [[case, "default"] for case in rtx.CASES]
    assert [row[:2] for row in later] == [["product", "CURRENT"], ["product", "SM80"]], (
        "nothing larger is tried where the product does not run"
    )
    assert "ERROR: no such GPU" in rows[-1][-1]
    assert answers["summary"] == ["runs here with plans for: default"]


def test_the_library_is_put_together_from_the_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = tuple(tmp_path / name for name in ("call1", "call2"))
    (tmp_path / rtx_setup.LIBRARY).write_bytes(b"library" * 1000)
    split_file(tmp_path / rtx_setup.LIBRARY, packs, preset=0)
    (tmp_path / "tensorrt_rtx").mkdir()
    (tmp_path / "tensorrt_rtx" / "__init__.py").write_text("")
    with tarfile.open(packs[1] / rtx_setup.REST, "w:xz") as rest:
        rest.add(tmp_path / "tensorrt_rtx", "tensorrt_rtx")
    work = tmp_path / "work"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    site = rtx_setup.library_site(Given(name="rtx", pack=packs, work=work))
    assert site is not None
    assert sys.path[0] == str(site)
    assert os.environ["PYTHONPATH"] == f"{site}{os.pathsep}before"
    assert (site / "tensorrt_rtx" / "__init__.py").is_file()
    assert (site / "tensorrt_rtx_libs" / rtx_setup.LIBRARY).read_bytes() == b"library" * 1000
    with pytest.raises(SkipSectionError, match=r"libtensorrt_rtx.so.1.0.xz"):
        rtx_setup.library_site(Given(name="rtx", pack=packs[1:], work=tmp_path / "other"))
