"""Commands on a machine with two fake GPUs: generate, and the report of the doctor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.commands import Commands
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import GPUS, bundle_with_engines
from twotower.builders import build_engines, builder_for
from twotower.cli.doctor import COMMAND
from twotower.cli.main import main
from twotower.doctor import report
from twotower.doctor.sections import Section
from twotower.hardware import Machine
from twotower.runtime import engines
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.trt_engine import open_tensorrt
from twotower.tensorrt_library import variant_from_module

LIBRARIES = {"tensorrt-rtx-cu13": "1.7", "onnxruntime": "1.32"}
MACHINE = Machine("a machine", 2, 1 << 34, GPUS[:2], LIBRARIES, "a processor", "580.1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("gpu-commands")
    made = bundle_with_engines("hybrid-b", folder / "bundle", max_context=512)
    build_engines(made, "ort-cpu", builder_for("ort-cpu"))
    return made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[engines.OpenOptions]:
    """Puts the fakes in the place of TensorRT for RTX; returns the options of every opening."""
    seen: list[engines.OpenOptions] = []

    def open_(bundle: Any, options: engines.OpenOptions) -> Any:
        seen.append(options)
        api = FakeCuda(devices=2, sm=GPUS[0].sm)
        given = replace(options, gpus=GPUS[:2])
        return open_tensorrt(bundle, variant_from_module(FakeTensorRT(api)), Cuda(api), given)

    monkeypatch.setitem(engines.OPENERS, "rtx", open_)
    for module in ("twotower.runtime.session", "twotower.cli.doctor", "twotower.cli.inspect"):
        monkeypatch.setattr(f"{module}.probe_machine", lambda: MACHINE)
    return seen


def test_generate_takes_the_gpu_of_its_own_accord(
    bundle: Any, opened: list[Any], cli: Commands
) -> None:
    words = f"generate {bundle.path} --tokens '5 6 7' --max-new-tokens 20 --ignore-eos"
    ways = ("", "--devices 0,1", "--no-cuda-graphs", "--target ort-cpu --warm-up 1,2")
    texts = [cli.json(words, more)["tokens"] for more in ways]
    assert texts == [texts[0]] * 4
    assert [(o.devices, o.graphs) for o in opened] == [((), True), ((0, 1), True), ((), False)]


@pytest.mark.parametrize(
    "words", ["--devices x", "--devices 0,7", "--warm-up all", "--warm-up 1,9"]
)
def test_lists_that_are_none(bundle: Any, opened: list[Any], cli: Commands, words: str) -> None:
    cli.refused("generate", bundle.path, "--tokens 5", words, what="")


@pytest.fixture
def sections_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections are answered in this process, which alone knows the fakes."""

    def ask(section: Section, work: Path) -> dict[str, Any]:
        file = work / f"{section.name}.json"
        words = section.command[len(COMMAND) - 1 :]  # from "doctor" on
        code = main([*words, "--answers", str(file), "--seconds", "600"])
        state = "ok" if code == 0 else "failed"
        answers = json.loads(file.read_text())
        return {"question": section.question, "state": state, "seconds": 0.0, "answers": answers}

    # A stack is printed to the real stderr, which pytest has taken.
    nothing = SimpleNamespace(
        enable=lambda: None,
        dump_traceback_later=lambda *_, **__: None,
        cancel_dump_traceback_later=lambda: None,
    )
    monkeypatch.setattr("twotower.doctor.sections.faulthandler", nothing)
    monkeypatch.setattr(report, "ask_section", ask)
    monkeypatch.setattr(report, "open_cuda", lambda: Cuda(FakeCuda(devices=2, sm=GPUS[0].sm)))
    # Of a GiB, which takes the fake seconds.
    monkeypatch.setattr(report, "copy_rates", lambda cuda: {})


@pytest.mark.slow
def test_the_report_of_a_device(
    bundle: Any, opened: list[Any], sections_here: None, tmp_path: Path, cli: Commands
) -> None:
    cli("doctor", bundle.path, "--report", tmp_path)
    rtx = json.loads((tmp_path / "results.json").read_text())["sections"]["target-rtx"]["answers"]
    assert {check["name"]: check["ok"] for check in rtx["checks"]}.items() >= {
        "reference answer": True,
        "keys and values in other memory for every block": True,
        "passes launched piece by piece": True,
        "a tower on each of two GPUs": True,
    }.items()
    assert "Time of a pass" in (tmp_path / "fake-0.md").read_text()


def test_a_reference_answer_too_long_for_the_engines_is_a_note(
    tmp_path: Path, opened: list[Any], cli: Commands
) -> None:
    made = bundle_with_engines("hybrid-b", tmp_path / "bundle", max_context=256)
    build_engines(made, "ort-cpu", builder_for("ort-cpu"))
    out = cli("doctor", made.path).out
    assert "note    reference answer: these engines hold texts of 256 tokens" in out
