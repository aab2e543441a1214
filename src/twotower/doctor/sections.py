"""Questions to a machine, each in a process of its own: a crash or a hang costs only its answer."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.files import write_atomically

OK, SKIPPED, FAILED, STOPPED, NOT_ASKED = "ok", "skipped", "failed", "stopped", "not asked"
"""What became of a section. One that was stopped or failed keeps the answers written by then."""

_EXIT_SKIPPED = 77
_GRACE = 5.0
"""Seconds after its limit at which a section is killed that could not even end itself."""

_LAST_LINES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One question, answered by a command within `seconds`; `name` is also the name of its log.

    The command is started with `--answers FILE --seconds N` added, and calls `answer_section` with
    them.
    """

    name: str
    question: str
    seconds: float
    command: tuple[str, ...]


class SkipSectionError(Exception):
    """A section cannot be asked here; the text says what is not installed or was not brought."""


class Answers(dict[str, Any]):
    """What a section has found so far, as plain data.

    It is on the disk after every `put`, so that a crash loses only what comes after.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        super().__init__()
        self._file, self._end = file, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the section is stopped."""
        return self._end - time.monotonic()

    def put(self, **facts: Any) -> None:
        """Adds facts, or replaces those of the same names."""
        self.update(facts)
        write_atomically(self._file, json.dumps(self))

    def say(self, line: str) -> None:
        """Adds a sentence to the section's summary, which is what a reader sees first."""
        self.put(summary=[*self.get("summary", []), line])

    def table(
        self, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], *, note: str = ""
    ) -> None:
        """Adds a table, or replaces the one of the same title."""
        made = {
            "title": title,
            "head": list(head),
            "rows": [list(row) for row in rows],
            "note": note,
        }
        self.put(tables=[*(t for t in self.get("tables", []) if t["title"] != title), made])


def answer_section(ask: Callable[[Answers], None], file: Path, seconds: float) -> int:
    """Answers one section in this process; the exit code says how it went.

    The log, which is what the process prints, has the stack of an error or of a call that hung.

    Args:
        ask: Puts what it finds into the answers; raises `SkipSectionError` to be skipped.
        file: Where answers are written.
        seconds: The time limit. A thread of its own ends the process, wherever it hangs.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(seconds, 0.1), exit=True)
    answers = Answers(file, seconds)
    answers.put()
    try:
        ask(answers)
    except SkipSectionError as e:
        answers.put(reason=str(e))
        return _EXIT_SKIPPED
    except Exception as e:  # noqa: BLE001 - whatever it is, it is this section's answer
        answers.put(error=f"{type(e).__name__}: {e}")
        traceback.print_exc()
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 0


def ask_section(
    section: Section,
    work: Path,
    *,
    seconds: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Asks one section in a process of its own, and ends whatever that process has started.

    The folder `work` gets the log `<name>.log` and the answers `<name>.json`; `seconds` may shorten
    the section's time limit. Returns `question`, `state`, `seconds` it took, `answers`, and the
    `last_words` of one that did not end well: how it ended and the last lines of its log.
    """
    limit = section.seconds if seconds is None else min(section.seconds, seconds)
    log, file = work / f"{section.name}.log", work / f"{section.name}.json"
    command = [
        *section.command,
        "--answers",
        str(file),
        "--seconds",
        f"{limit:.1f}",
    ]
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_with_package(os.environ if environment is None else environment),
            start_new_session=True,
        )
        try:
            process.wait(limit + _GRACE)
        except subprocess.TimeoutExpired:
            out.write(f"killed {_GRACE:.0f} s after the limit of {limit:.0f} s\n".encode())
        finally:
            _end(process)
    took = time.monotonic() - began
    answers = _read(file)
    state, how = _state(process.returncode, stopped=took >= limit)
    result = {
        "question": section.question,
        "state": state,
        "seconds": round(took, 1),
        "answers": answers,
    }
    if state in (FAILED, STOPPED):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        result["last_words"] = [how, *lines[-_LAST_LINES:]]
    return result


def short(number: float) -> float:
    """A measured number with four digits."""
    return float(f"{number:.4g}")


def _with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process finds this very package, installed or not."""
    package = str(Path(__file__).resolve().parents[2])
    paths = filter(None, (package, environment.get("PYTHONPATH")))
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a section's process and every process it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):  # all of them have ended by themselves
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _state(code: int, *, stopped: bool) -> tuple[str, str]:
    """The state and, in words, how the process ended."""
    if code == 0:
        return OK, "it answered"
    if code == _EXIT_SKIPPED:
        return SKIPPED, "it was skipped"
    if stopped:
        return STOPPED, "its time was over"
    return FAILED, f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}  # it ended before its first answer
