"""`twotower evaluate` and `twotower tune` as they are typed, on a model whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.bundles import built_fixture
from tests.helpers.errors import check_error
from tests.helpers.fake_model import FakeModel, problem
from twotower.bundle import Bundle
from twotower.cli.main import main
from twotower.runtime import TwoTower

PROBLEMS = tuple(problem(kind, i) for kind in ("sums", "words") for i in range(20))
FEW = ["--thresholds", "0.5,0.9", "--steps", "2,16"]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    file = tmp_path / "suite.jsonl"
    lines = [{"id": p.id, "kind": p.kind, "prompt": p.prompt, "answer": p.answer} for p in PROBLEMS]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel(PROBLEMS, wrong_below=1.0)
    monkeypatch.setattr(TwoTower, "open", lambda *args, **options: fake)
    return fake


def test_the_table_and_the_files_say_the_same(
    model: FakeModel,
    suite: Path,
    built_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, bundle = tmp_path / "report.html", str(built_bundle)
    words = ["evaluate", bundle, "--suite", str(suite), *FEW, "--html", str(page)]
    assert main([*words, "--budget", "98.7"]) == 0
    captured = capsys.readouterr()
    assert "40 problems of 2 kinds" in captured.out
    assert "diffusion keeps 100.0 [100.0, 100.0] %" in captured.out
    assert "budget of 98.7 %: kept" in captured.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bundle"] == {"name": built_bundle.name, "target": "fake"}
    assert report["budget"]["met"] is True
    assert "100.0 %" in page.read_text()
    assert f"<title>{Bundle.open(built_bundle).source['name']}: quality" in page.read_text()
    assert "<svg" in page.read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for file in ("report.html", "report.json", "report.png"):
        assert str(tmp_path / file) in captured.err
    assert not list(tmp_path.glob(".*"))


def test_json_goes_to_stdout_or_a_file(
    model: FakeModel, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "evaluate",
        "b",
        "--suite",
        str(suite),
        *FEW,
        "--limit",
        "3",
        "--kinds",
        "sums",
        "--json",
        "-o",
        str(tmp_path / "r.json"),
    ]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["suite"]["problems"] == 3
    assert report == json.loads((tmp_path / "r.json").read_text())


def test_below_the_budget_the_exit_code_is_three(
    model: FakeModel, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.wrong_below = -1.0
    assert (
        main(["evaluate", "b", "--suite", str(suite), *FEW, "--budget", "98.7", "--no-likelihood"])
        == 3
    )
    assert "NOT kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--suite", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--kinds", "poems"], "poems"),
        (["--limit", "0"], "limit"),
        (["--thresholds", "0.5,x"], "--thresholds"),
        (["--steps", ""], "--steps"),
        (["--html", "no/such/folder/r.html"], "cannot write"),
        (["--thresholds", "2"], "confidence_threshold"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    model: FakeModel, suite: Path, capsys: pytest.CaptureFixture[str], words: list[str], what: str
) -> None:
    assert main(["evaluate", "b", "--suite", str(suite), *words]) == 2
    check_error(capsys.readouterr().err, what)
    assert not model.calls


def test_a_malformed_suite_is_named_by_line(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text('{"kind": "a", "prompt": "p", "answer": "q"}\n{"kind": "a"}\n')
    for verb in (["evaluate", "b"], ["tune", "b", "-o", str(tmp_path / "t")]):
        assert main([*verb, "--suite", str(file)]) == 2
        check_error(capsys.readouterr().err, "line 2")


def test_a_bundle_without_a_tokenizer_is_refused(
    built_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(built_bundle), *FEW]) == 2
    check_error(capsys.readouterr().err, "tokenizer")


def test_tune_writes_presets_into_a_copy(
    model: FakeModel,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = built_fixture("hybrid-a", tmp_path / "b")
    words = ["tune", str(bundle.path), "--suite", str(suite), *FEW, "-o", str(tmp_path / "tuned")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == [
        "preset",
        "quality",
        "balanced",
        "fast",
    ]
    monkeypatch.undo()
    tuned = Bundle.open(tmp_path / "tuned")
    assert set(tuned.presets) == {"quality", "balanced", "fast"}
    assert tuned.defaults == tuned.presets["balanced"]
    assert tuned.defaults.confidence_threshold == 0.5
    report = json.loads((tmp_path / "tuned" / "reports" / "tune.json").read_text())
    assert report["budget"] == 98.7
    assert report["auto"]["measured_on"] == {"target": "fake"}
    assert [(t["block_size"], t["rows"], t["step_ms"]) for t in report["auto"]["times"]] == [
        (16, 1, 1.0)
    ]
    passes = {(p["threshold"], p["steps"]): p["passes_per_block"] for p in report["auto"]["passes"]}
    assert passes == {(0.5, 2): 2, (0.9, 2): 2, (0.5, 16): 6, (0.9, 16): 10}
    assert (
        main(
            [
                "generate",
                str(tmp_path / "tuned"),
                "--tokens",
                "5",
                "--preset",
                "fast",
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    assert main(["generate", str(tmp_path / "tuned"), "--tokens", "5", "--preset", "slow"]) == 2
    check_error(capsys.readouterr().err, "slow")


def test_tune_never_overwrites_and_says_when_nothing_fits(
    model: FakeModel, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tuned").mkdir()
    words = ["tune", "b", "--suite", str(suite), *FEW]
    assert main([*words, "-o", str(tmp_path / "tuned")]) == 2
    check_error(capsys.readouterr().err, "exists already")
    assert not model.calls
    model.wrong_below = -1.0
    assert main([*words, "-o", str(tmp_path / "other")]) == 3
    check_error(capsys.readouterr().err, "the best of 4 is threshold")
    assert not (tmp_path / "other").exists()
    assert main([*words, "-o", str(tmp_path / "other"), "--budget", "120"]) == 2
    check_error(capsys.readouterr().err, "budget 120")
