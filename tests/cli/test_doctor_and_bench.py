"""`twotower doctor` and `twotower bench` as they are typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Commands
from tests.helpers.errors import check_error
from twotower.doctor import read_results
from twotower.doctor.checks import CheckResult
from twotower.hardware import Gpu, Machine


@pytest.mark.slow
def test_doctor_checks_the_whole_chain(cli: Commands) -> None:
    facts = cli.json("doctor")
    assert facts["targets"]["ort-cpu"] == "can run here"
    checks = {c["name"]: c["ok"] for c in facts["checks"]}
    assert checks["reference answer, diffusion"] is True
    assert checks["reference answer, ar"] is True
    assert False not in checks.values()


def test_doctor_checks_a_bundle(built_bundle: Path, cli: Commands) -> None:
    out = cli("doctor", built_bundle).out
    assert "ok      output is independent of batch composition" in out
    assert "FAILED" not in out


@pytest.mark.parametrize(
    ("outcome", "code", "mark"), [(True, 0, "ok"), (None, 0, "note"), (False, 1, "FAILED")]
)
def test_only_a_failed_check_fails_the_doctor(
    cli: Commands, monkeypatch: pytest.MonkeyPatch, outcome: bool | None, code: int, mark: str
) -> None:
    def checks(say: Any, target: str) -> Iterator[CheckResult]:
        yield CheckResult("the sky", outcome, "blue")

    monkeypatch.setattr("twotower.doctor.target_checks.check_chain", checks)
    assert f"{mark:<6}  the sky: blue" in cli("doctor", code=code).out


def test_what_the_doctor_refuses(tmp_path: Path, cli: Commands) -> None:
    check_error(cli("doctor", tmp_path, code=2).err, str(tmp_path))
    cli.refused("doctor --report", tmp_path / "none", what="none")  # before any work


def test_bench_compares_the_modes(built_bundle: Path, cli: Commands) -> None:
    words = f"bench {built_bundle} --prompt-tokens 8 --max-new-tokens 32 --rows 2 --runs 2"
    facts = cli.json(words)
    assert facts["rows"] == 2
    ratio = facts["diffusion"]["tokens_per_second"] / facts["ar"]["tokens_per_second"]
    assert facts["diffusion_to_ar"] == pytest.approx(ratio)
    assert facts["ar"]["tokens_per_nfe"] == pytest.approx(1, abs=0.1)
    assert "breaks even" in cli(words).out


@pytest.mark.trained
def test_bench_of_an_export(tmp_path: Path, cli: Commands) -> None:
    facts = cli.json("bench --export --scratch", tmp_path)
    assert facts["checkpoint_bytes"] > 0
    assert 0 < facts["export_peak_bytes"] < 2 << 30
    assert facts["export_seconds"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", ["", "B --runs 0", "B --rows 0", "B --max-new-tokens 0", "B --prompt-tokens 0"]
)
def test_nothing_to_measure_is_a_user_error(built_bundle: Path, cli: Commands, words: str) -> None:
    cli.refused("bench", words.replace("B", str(built_bundle)), what="")


@pytest.mark.slow
def test_a_report_is_an_archive_and_a_page_named_after_the_device(
    built_bundle: Path, tmp_path: Path, cli: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = {"onnxruntime": "1.32"}
    machine = Machine("Linux", 3, 8 << 30, (), libraries, processor="Some | CPU (R) 9000")
    monkeypatch.setattr("twotower.cli.doctor.probe_machine", lambda: machine)
    facts = cli.json("doctor", built_bundle, "--target ort-cpu --report", tmp_path)
    names = {"logs.tar.gz", "results.json", "some-cpu-r-9000.md"}
    assert {file.name for file in tmp_path.iterdir()} == names
    page = (tmp_path / "some-cpu-r-9000.md").read_text(encoding="utf-8")
    assert page.startswith("# Some | CPU (R) 9000\n")
    assert "| reference answer | ok |" in page
    assert "| trt | tensorrt is not installed |" in page
    assert all(c["target"] == "ort-cpu" for c in facts["checks"])
    (times,) = facts["passes"]
    assert times["denoise_ms"] > 0 and times["extend_ms"] > 0
    rate = times["denoiser_bytes"] / times["denoise_ms"] / 1e6
    assert times["denoise_gb_per_s"] == pytest.approx(rate)
    assert f"{times['denoise_ms']:.3f} ms" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").endswith(" |") for line in rows)
    results = read_results(tmp_path / "results.json")
    assert list(results["sections"]) == ["machine", "target-ort-cpu"], (
        "no GPU: its sections are not asked"
    )
    assert results["sections"]["target-ort-cpu"]["answers"]["checks"] == facts["checks"]
    assert str(built_bundle) not in json.dumps(results)


@pytest.mark.slow
def test_a_report_checks_every_target_that_runs_here_and_shows_the_one_that_does_not_open(
    built_bundle: Path, tmp_path: Path, cli: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sections' processes see the real machine: there `trt` cannot be opened, and CUDA has no
    # GPU.
    libraries = {"onnxruntime-gpu": "1.32", "tensorrt": "11.4"}
    machine = Machine("Linux", 3, 8 << 30, (Gpu("NVIDIA Thing", 90, 1 << 30),), libraries)
    monkeypatch.setattr("twotower.cli.doctor.probe_machine", lambda: machine)
    monkeypatch.setattr(
        "twotower.doctor.report._targets", lambda machine, options: ["trt", "ort-cpu"]
    )
    out = cli("doctor", built_bundle, "--report", tmp_path, code=1).out
    page = (tmp_path / "nvidia-thing.md").read_text(encoding="utf-8")
    assert "| runs | **FAILED** | no engine fits this machine" in page
    assert "| reference answer | ok |" in page
    assert "FAILED  cuda: exit code 1; " in out
    assert "ok      reference answer: " in out
