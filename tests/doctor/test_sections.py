"""Sections survive whatever they do: each ends within its limit, and what it had found is kept."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import is_gone
from twotower.doctor.sections import FAILED, OK, SKIPPED, STOPPED, Section, ask_section

CHILD = """
import ctypes, os, subprocess, sys, time
from pathlib import Path
from twotower.doctor.sections import SkipSectionError, answer_section

def ask(answers):
    answers.put(first=1)
    {body}

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
sys.exit(answer_section(ask, Path(words["--answers"]), float(words["--seconds"])))
"""


def asked(
    work: Path, body: str, *, seconds: float = 30, at_most: float | None = None
) -> dict[str, Any]:
    script = work / "child.py"
    script.write_text(CHILD.format(body=body))
    command = (sys.executable, str(script))
    section = Section(name="it", question="Does it?", seconds=seconds, command=command)
    return ask_section(section, work, seconds=at_most)


def test_answers_come_back(tmp_path: Path) -> None:
    """A table takes the place of one with the same title."""
    table = "[answers.table('T', ('a',), [(n,)]) for n in range(3)]"
    result = asked(tmp_path, f"answers.say('one'); answers.say('two'); {table}")
    assert (result["state"], result["question"]) == (OK, "Does it?")
    assert result["answers"]["summary"] == ["one", "two"]
    assert result["answers"]["tables"] == [{"title": "T", "head": ["a"], "rows": [[2]], "note": ""}]
    assert "last_words" not in result


@pytest.mark.parametrize(
    ("body", "state", "answers", "last"),
    [
        ("raise SkipSectionError('no torch')", SKIPPED, {"reason": "no torch"}, ""),
        ("raise ValueError('three')", FAILED, {"error": "ValueError: three"}, "exit code 1"),
        ("ctypes.string_at(0)", FAILED, {}, "ended by SIGSEGV"),
    ],
)
def test_a_section_that_ends_early_says_why_and_keeps_what_was_found(
    tmp_path: Path, body: str, state: str, answers: dict[str, Any], last: str
) -> None:
    result = asked(tmp_path, body)
    assert result["state"] == state
    assert result["answers"] == {"first": 1, **answers}
    if last:
        assert result["last_words"][0] == last
        assert "in ask" in (tmp_path / "it.log").read_text(), "the log says where"


@pytest.mark.slow
def test_a_section_ends_at_its_limit_with_all_it_started(tmp_path: Path) -> None:
    body = "answers.put(first=subprocess.Popen(['sleep', '987']).pid); time.sleep(987)"
    began = time.monotonic()
    result = asked(tmp_path, body, seconds=2)
    assert time.monotonic() - began < 60
    assert result["state"] == STOPPED
    assert "in ask" in (tmp_path / "it.log").read_text(), "the log says where it hung"
    assert is_gone(result["answers"]["first"])


@pytest.mark.slow
def test_a_process_that_cannot_end_itself_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.doctor.sections._GRACE", 0.5)
    body = "import faulthandler; faulthandler.cancel_dump_traceback_later(); time.sleep(987)"
    result = asked(tmp_path, body, seconds=1)
    assert result["state"] == STOPPED
    assert "killed" in result["last_words"][-1]


@pytest.mark.parametrize(("given", "taken"), [(None, "30.0"), (7.0, "7.0"), (99.0, "30.0")])
def test_a_shorter_limit_counts(tmp_path: Path, given: float | None, taken: str) -> None:
    result = asked(tmp_path, "answers.put(words=sys.argv)", at_most=given)
    assert result["answers"]["words"][-1] == taken
