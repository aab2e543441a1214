"""`twotower doctor` and `twotower bench` as they are typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twotower.cli.main import main
from twotower.doctor.checks import CheckResult


def test_doctor_checks_the_whole_chain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["targets"]["ort-cpu"] == "can run here"
    checks = {c["name"]: c["ok"] for c in facts["checks"]}
    assert checks["reference answer, diffusion"] is True
    assert checks["reference answer, ar"] is True
    assert False not in checks.values()


def test_doctor_checks_a_bundle(built_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(built_bundle)]) == 0
    out = capsys.readouterr().out
    assert "ok      output is independent of batch composition" in out
    assert "FAILED" not in out


@pytest.mark.parametrize(
    ("outcome", "code", "mark"), [(True, 0, "ok"), (None, 0, "note"), (False, 1, "FAILED")]
)
def test_only_a_failed_check_fails_the_doctor(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    outcome: bool | None,
    code: int,
    mark: str,
) -> None:
    def checks(say: Any, target: str) -> Iterator[CheckResult]:
        yield CheckResult("the sky", outcome, "blue")

    monkeypatch.setattr("twotower.doctor.target_checks.check_chain", checks)
    assert main(["doctor"]) == code
    assert f"{mark:<6}  the sky: blue" in capsys.readouterr().out


def test_doctor_of_no_bundle_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "\n  do: " in capsys.readouterr().err


def test_bench_compares_the_modes(built_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "bench",
        str(built_bundle),
        "--prompt-tokens",
        "8",
        "--max-new-tokens",
        "32",
        "--rows",
        "2",
        "--runs",
        "2",
    ]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 2
    ratio = facts["diffusion"]["tokens_per_second"] / facts["ar"]["tokens_per_second"]
    assert facts["diffusion_to_ar"] == pytest.approx(ratio)
    assert facts["ar"]["tokens_per_nfe"] == pytest.approx(1, abs=0.1)
    assert main(words) == 0
    assert "breaks even" in capsys.readouterr().out


@pytest.mark.trained
def test_bench_of_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--export", "--scratch", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoint_bytes"] > 0
    assert 0 < facts["export_peak_bytes"] < 2 << 30
    assert facts["export_seconds"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["B", "--runs", "0"],
        ["B", "--rows", "0"],
        ["B", "--max-new-tokens", "0"],
        ["B", "--prompt-tokens", "0"],
    ],
)
def test_nothing_to_measure_is_a_user_error(
    built_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["bench", *(str(built_bundle) if w == "B" else w for w in words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\n  do: " in captured.err


@pytest.mark.slow
def test_a_report_is_an_archive_and_a_page_named_after_the_device(
    built_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from twotower.doctor import read_results
    from twotower.hardware import Machine

    machine = Machine(
        "Linux", 3, 8 << 30, (), {"onnxruntime": "1.32"}, processor="Some | CPU (R) 9000"
    )
    monkeypatch.setattr("twotower.cli.doctor.probe_machine", lambda: machine)
    assert (
        main(
            [
                "doctor",
                str(built_bundle),
                "--target",
                "ort-cpu",
                "--report",
                str(tmp_path),
                "--json",
            ]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "logs.tar.gz",
        "results.json",
        "some-cpu-r-9000.md",
    ]
    page = (tmp_path / "some-cpu-r-9000.md").read_text(encoding="utf-8")
    assert page.startswith("# Some | CPU (R) 9000\n")
    assert "| reference answer | ok |" in page
    assert "| trt | tensorrt is not installed |" in page
    assert all(c["target"] == "ort-cpu" for c in facts["checks"])
    (times,) = facts["passes"]
    assert times["denoise_ms"] > 0 and times["extend_ms"] > 0
    assert times["denoise_gb_per_s"] == pytest.approx(
        times["denoiser_bytes"] / times["denoise_ms"] / 1e6
    )
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
    built_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from twotower.hardware import Gpu, Machine

    # The sections' processes see the real machine: there `trt` cannot be opened, and CUDA has no
    # GPU.
    libraries = {"onnxruntime-gpu": "1.32", "tensorrt": "11.4"}
    machine = Machine("Linux", 3, 8 << 30, (Gpu("NVIDIA Thing", 90, 1 << 30),), libraries)
    monkeypatch.setattr("twotower.cli.doctor.probe_machine", lambda: machine)
    monkeypatch.setattr(
        "twotower.doctor.report._targets", lambda machine, options: ["trt", "ort-cpu"]
    )
    assert main(["doctor", str(built_bundle), "--report", str(tmp_path)]) == 1
    page = (tmp_path / "nvidia-thing.md").read_text(encoding="utf-8")
    assert "| runs | **FAILED** | no engine fits this machine" in page
    assert "| reference answer | ok |" in page
    out = capsys.readouterr().out
    assert "FAILED  cuda: exit code 1; " in out
    assert "ok      reference answer: " in out


def test_a_report_into_no_folder_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--report", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "\n  do: " in captured.err
