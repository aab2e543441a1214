"""The first hour: without a GPU it says so; whatever a section does, there is an archive."""

from __future__ import annotations

import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from tools.gpu import first_hour
from tools.gpu.questions import CALL_SECONDS, QUESTIONS, Given, Question
from twotower.doctor import SkipSectionError, read_results
from twotower.hardware import Gpu, Machine

MACHINE = Machine("Linux", 2, 8 << 30, (Gpu("NVIDIA Thing", 90, 1 << 36),), {})
SECTIONS = {
    "fine": "answers.say(f'pack {[p.name for p in given.pack]}')",
    "crashes": "import ctypes; answers.put(n=1); ctypes.string_at(0)",
    "hangs": "import time; answers.put(n=2); time.sleep(600)",
    "lacks": "import a_library_that_is_not_here",
    "ours": "from tools.gpu import a_name_that_is_not_there",
    "late": "answers.put(n=3)",
}


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sections that go wrong in every way, in processes of their own; returns their folder."""
    entries = []
    for name, body in SECTIONS.items():
        text = body if body.startswith("import a_") else f"def ask(answers, given):\n    {body}"
        (tmp_path / f"{name}_section.py").write_text(f"{text}\n")
        seconds = 2 if name == "hangs" else 60
        entries.append((name, {"text": f"{name}?", "seconds": seconds, "call": 1}))
    (tmp_path / "runner.py").write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(first_hour.ROOT)!r}, {str(tmp_path)!r}]\n"
        "from tools.gpu import first_hour, questions\n"
        f"for name, facts in {entries!r}:\n"
        "    module = f'{name}_section'\n"
        "    questions.QUESTIONS[name] = questions.Question(module=module, **facts)\n"
        "sys.exit(first_hour.main())\n"
    )
    asked = {name: Question(module=name, **facts) for name, facts in entries}
    monkeypatch.setattr(first_hour, "QUESTIONS", asked)
    monkeypatch.setattr(first_hour, "COMMAND", (sys.executable, str(tmp_path / "runner.py")))
    monkeypatch.setattr(first_hour, "probe_machine", lambda: MACHINE)
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    return ["--out", str(folder / "out"), "--pages", str(folder / "pages"), *more]


@pytest.mark.parametrize(
    ("gpus", "more", "what"),
    [
        ((), (), "error: no GPU"),
        (MACHINE.gpus, ("--sections", "machine,nonsense"), "there is no section nonsense"),
    ],
)
def test_what_cannot_begin_says_so_and_writes_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...],
    more: tuple[str, ...],
    what: str,
) -> None:
    monkeypatch.setattr(first_hour, "probe_machine", lambda: replace(MACHINE, gpus=gpus))
    assert first_hour.main(words(tmp_path, *more)) == 2
    captured = capsys.readouterr()
    check_error(captured.err, what)
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whatever_sections_do_there_is_an_archive(
    sections: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sections / "pack" / "call1").mkdir(parents=True)
    (sections / "pack" / "call2").mkdir()
    assert first_hour.main(words(sections, "--pack", str(sections / "pack"))) == 0
    results = read_results(sections / "out" / "results.json")
    states = {name: s["state"] for name, s in results["sections"].items()}
    want = ("ok", "failed", "stopped", "skipped", "failed", "ok")
    assert states == dict(zip(SECTIONS, want, strict=True))
    answers: dict[str, Any] = {n: s["answers"] for n, s in results["sections"].items()}
    assert answers["fine"]["summary"] == ["pack ['call1', 'call2']"]
    assert answers["crashes"] == {"n": 1}
    assert answers["hangs"] == {"n": 2}
    assert "a_library_that_is_not_here" in answers["lacks"]["reason"]
    assert results["device"] == "NVIDIA Thing"
    page = (sections / "pages" / "nvidia-thing.md").read_text(encoding="utf-8")
    assert page == (sections / "out" / "nvidia-thing.md").read_text(encoding="utf-8")
    assert "| hangs | hangs? | **stopped** |" in page
    with tarfile.open(sections / "out" / "logs.tar.gz") as logs:
        assert sorted(logs.getnames()) == sorted(f"{name}.log" for name in SECTIONS)
    assert "== crashes: failed" in capsys.readouterr().out


def test_sections_are_not_begun_when_time_is_over(sections: Path) -> None:
    assert first_hour.main(words(sections, "--sections", "fine,late", "--budget", "5")) == 0
    results = read_results(sections / "out" / "results.json")
    assert {s["state"] for s in results["sections"].values()} == {"not asked"}


def test_what_was_not_brought_is_named(tmp_path: Path) -> None:
    given = Given(name="it", pack=(tmp_path,), work=tmp_path)
    (tmp_path / "here").write_text("")
    assert given.need("here") == tmp_path / "here"
    with pytest.raises(SkipSectionError, match="not-here was not brought"):
        given.need("not-here")


def test_every_question_has_a_module() -> None:
    for name, question in QUESTIONS.items():
        assert (first_hour.ROOT / f"{question.module.replace('.', '/')}.py").is_file(), name
        assert question.text.endswith("?")


def test_each_call_fits_into_its_device_time() -> None:
    """530 s for the first; 15 minutes for both, a machine's start and transfers included.

    Only what comes last may be left without time, and it has enough if the others take half of
    their limits.
    """
    for call, budget in CALL_SECONDS.items():
        limits = [q.seconds for q in QUESTIONS.values() if q.call == call]
        assert sum(limits[:-1]) <= budget
        assert sum(limits[:-1]) / 2 + limits[-1] <= budget
    assert 0 < CALL_SECONDS[1] <= 530
    assert sum(CALL_SECONDS.values()) <= 780
    assert {q.call for q in QUESTIONS.values()} == {None, *CALL_SECONDS}
