"""Section `rtx`: does TensorRT for RTX run on this GPU, and with which capability of a plan?

Each plan is tried in a process of its own (`tools.gpu.rtx_trial`), the smallest first. All that the
library logs is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.gpu.questions import Given
from tools.gpu.rtx_setup import CAPABILITIES, library_site
from twotower.doctor import Answers
from twotower.doctor.sections import short

__all__ = ["CASES", "FOLDER", "Trial", "ask", "run_trial"]

CASES = ("product", "denoiser", "context")
FOLDER = "rtx"
"""Of the cases, in a pack."""

COMMAND = (sys.executable, "-m", "tools.gpu.rtx_trial")
"""What starts the process of a trial."""

_TRIAL_SECONDS = 60.0
_LEAST_SECONDS = 10.0
_HEAD = ("case", "capability", "right", "replayed", "ms a run", "how far it came")


@dataclass(slots=True)
class Trial:
    """What a trial's process said.

    Attributes:
        facts: The last value of everything it said.
        log: The library's lines and everything else it printed.
    """

    facts: dict[str, Any]
    log: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether a run gave the expected numbers."""
        return self.facts.get("right") is True

    def row(self, case: str, capability: str) -> tuple[Any, ...]:
        """Of the table."""
        facts = self.facts
        end = "all steps" if facts.get("step") == "done" else f"stopped at: {facts.get('step')}"
        said = [line for line in self.log if not line.startswith(("INFO", "VERBOSE"))]
        why = "" if self.right else "; ".join(said)[-300:] or str(facts.get("error", ""))
        return (
            case,
            capability,
            facts.get("right"),
            facts.get("replay_right"),
            facts.get("ms_a_run"),
            f"{end}; {why}" if why else end,
        )


def ask(answers: Answers, given: Given) -> None:
    cases = given.need(FOLDER)
    began = time.monotonic()
    library_site(given)
    answers.put(library_ready_seconds=short(time.monotonic() - began))
    rows: list[tuple[Any, ...]] = []
    for capability in CAPABILITIES:
        for case in CASES:
            if answers.left < _LEAST_SECONDS:
                answers.say("stopped: no time left")
                return
            seconds = min(_TRIAL_SECONDS, answers.left - 5)
            trial = run_trial((str(cases), case, capability), seconds)
            answers.put(**{f"{case} {capability}": {**trial.facts, "log": trial.log[-100:]}})
            rows.append(trial.row(case, capability))
            answers.table("Plans", _HEAD, rows)
            if case == CASES[0]:
                answers.put(runs={**answers.get("runs", {}), capability: trial.right})
                if not trial.right:
                    break  # nothing larger will run for this capability
    works = [name for name, right in answers["runs"].items() if right]
    answers.say(f"runs here with plans for: {', '.join(works) or 'none of ' + str(CAPABILITIES)}")


def run_trial(words: Sequence[str], seconds: float) -> Trial:
    """Runs `tools.gpu.rtx_trial` with these arguments and reads what it says, line by line."""
    command = [*COMMAND, *words]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        out, err, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as e:
        out, err, code = _text(e.stdout), _text(e.stderr), None
    trial = Trial({"exit": code})
    for line in out.splitlines():
        said = _said(line)
        trial.log += [said.pop("log")] if "log" in said else []
        trial.facts.update(said)
    sys.stdout.write(out)
    sys.stderr.write(err)
    if code != 0:
        last = err.strip().splitlines()[-1:]
        trial.facts["error"] = "no answer in time" if code is None else "".join(last) or f"{code}"
    return trial


def _said(line: str) -> dict[str, Any]:
    """A line of a trial: JSON of its own, or something a library printed."""
    try:
        said = json.loads(line)
    except ValueError:
        return {"log": line}
    return said if isinstance(said, dict) else {"log": line}


def _text(printed: Any) -> str:
    if isinstance(printed, bytes):
        return printed.decode(errors="replace")
    return printed or ""
