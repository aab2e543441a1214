"""`twotower evaluate` and `twotower tune` as they are typed, on a model whose figures are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.bundles import built_fixture
from tests.helpers.commands import Commands
from tests.helpers.errors import check_error
from tests.helpers.fake_model import FakeModel, problem
from twotower.bundle import Bundle
from twotower.runtime import TwoTower

PROBLEMS = tuple(problem(kind, i) for kind in ("sums", "words") for i in range(20))
FEW = "--thresholds 0.5,0.9 --steps 2,16"


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
    model: FakeModel, suite: Path, built_bundle: Path, tmp_path: Path, cli: Commands
) -> None:
    page = tmp_path / "report.html"
    words = f"--suite {suite} {FEW} --html {page} --budget 98.7"
    out, err = cli("evaluate", built_bundle, words)
    assert "40 problems of 2 kinds" in out
    assert "diffusion keeps 100.0 [100.0, 100.0] %" in out
    assert "budget of 98.7 %: kept" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bundle"] == {"name": built_bundle.name, "target": "fake"}
    assert report["budget"]["met"] is True
    shown = page.read_text()
    assert "100.0 %" in shown and "<svg" in shown
    assert f"<title>{Bundle.open(built_bundle).source['name']}: quality" in shown
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    for file in ("report.html", "report.json", "report.png"):
        assert str(tmp_path / file) in err
    assert not list(tmp_path.glob(".*"))


def test_json_goes_to_stdout_or_a_file(
    model: FakeModel, suite: Path, tmp_path: Path, cli: Commands
) -> None:
    file = tmp_path / "r.json"
    report = cli.json(f"evaluate b --suite {suite} {FEW} --limit 3 --kinds sums -o {file}")
    assert report["suite"]["problems"] == 3
    assert report == json.loads(file.read_text())


def test_a_full_disk_costs_the_files_and_not_the_figures(
    model: FakeModel, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Commands
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    words = f"evaluate b --suite {suite} {FEW} -o {tmp_path / 'r.json'}"
    out, err = cli(words, code=2)
    check_error(err, "No space left")
    assert "diffusion keeps" in out
    assert [file.name for file in tmp_path.iterdir()] == ["suite.jsonl"]


def test_below_the_budget_the_exit_code_is_three(
    model: FakeModel, suite: Path, cli: Commands
) -> None:
    model.wrong_below = -1.0
    words = f"evaluate b --suite {suite} {FEW} --budget 98.7 --no-likelihood"
    assert "NOT kept" in cli(words, code=3).out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--suite nowhere.jsonl", "nowhere.jsonl"),
        ("--kinds poems", "poems"),
        ("--limit 0", "limit"),
        ("--thresholds 0.5,x", "--thresholds"),
        ("--steps ''", "--steps"),
        ("--html no/such/folder/r.html", "cannot write"),
        ("--thresholds 2", "confidence_threshold"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    model: FakeModel, suite: Path, cli: Commands, words: str, what: str
) -> None:
    cli.refused(f"evaluate b --suite {suite}", words, what=what)
    assert not model.calls


def test_a_bundle_without_a_tokenizer_is_refused(built_bundle: Path, cli: Commands) -> None:
    cli.refused("evaluate", built_bundle, FEW, what="tokenizer")


def test_tune_writes_presets_into_a_copy(
    model: FakeModel, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Commands
) -> None:
    bundle, output = built_fixture("hybrid-a", tmp_path / "b"), tmp_path / "tuned"
    out = cli("tune", bundle.path, f"--suite {suite} {FEW} -o {output}").out
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["preset", "quality", "balanced", "fast"]
    monkeypatch.undo()
    tuned = Bundle.open(output)
    assert set(tuned.presets) == {"quality", "balanced", "fast"}
    assert tuned.defaults == tuned.presets["balanced"]
    assert tuned.defaults.confidence_threshold == 0.5
    report = json.loads((output / "reports" / "tune.json").read_text())
    assert report["budget"] == 98.7
    auto = report["auto"]
    assert auto["measured_on"] == {"target": "fake"}
    times = [(t["block_size"], t["rows"], t["step_ms"]) for t in auto["times"]]
    assert times == [(16, 1, 1.0)]
    passes = {(p["threshold"], p["steps"]): p["passes_per_block"] for p in auto["passes"]}
    assert passes == {(0.5, 2): 2, (0.9, 2): 2, (0.5, 16): 6, (0.9, 16): 10}
    cli("generate", output, "--tokens 5 --preset fast --max-new-tokens 4")
    cli.refused("generate", output, "--tokens 5 --preset slow", what="slow")


def test_tune_never_overwrites_and_says_when_nothing_fits(
    model: FakeModel, suite: Path, tmp_path: Path, cli: Commands
) -> None:
    (tmp_path / "tuned").mkdir()
    words = f"tune b --suite {suite} {FEW}"
    cli.refused(words, "-o", tmp_path / "tuned", what="exists already")
    assert not model.calls
    model.wrong_below = -1.0
    err = cli(words, "-o", tmp_path / "other", code=3).err
    check_error(err, "the best of 4 is threshold")
    assert not (tmp_path / "other").exists()
    cli.refused(words, "-o", tmp_path / "other", "--budget 120", what="budget 120")
