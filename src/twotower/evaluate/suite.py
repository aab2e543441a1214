"""Problems with one right answer: reading a suite file, and judging what a model wrote."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Literal

from twotower.errors import SuiteError
from twotower.records import RecordError, decode

_FORM = 'write one {"kind": ..., "prompt": ..., "answer": ...} a line'
_LONGEST_PERIOD, _REPEATS, _REPEATED_TOKENS = 16, 4, 16


@dataclass(frozen=True, slots=True)
class Problem:
    """One question: a prompt the model continues, and the right answer without space around it.

    `kind` is the task; `length` is `in` or `out`, whether the model was trained on problems of this
    length; `match` is `exact`, or `contains` for models that may say more than the answer.
    """

    id: str
    kind: str
    prompt: str
    answer: str
    length: Literal["in", "out"] = "in"
    match: Literal["exact", "contains"] = "exact"

    def __post_init__(self) -> None:
        if not self.answer:
            raise ValueError("the answer is empty")


@dataclass(frozen=True, slots=True)
class Suite:
    """Problems, and what names them: a result says little without the exact questions."""

    name: str
    sha256: str
    problems: tuple[Problem, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of task, sorted."""
        return tuple(sorted({p.kind for p in self.problems}))

    def only(self, *, kinds: Collection[str] = (), limit: int | None = None) -> Suite:
        """The problems of some kinds, and of each kind `limit` ones spread over its problems.

        SuiteError if a kind does not occur, or nothing is left.
        """
        unknown = sorted(set(kinds) - set(self.kinds))
        if unknown or (limit is not None and limit < 1):
            what = (
                f"the suite has no problems of kind {', '.join(unknown)}"
                if unknown
                else f"a limit of {limit} leaves no problems"
            )
            raise SuiteError(
                what,
                found=f"kinds: {', '.join(self.kinds)}",
                do="choose among them with --kinds, and 1 or more with --limit",
            )
        kept: list[Problem] = []
        for kind in kinds or self.kinds:
            members = [p for p in self.problems if p.kind == kind]
            count = min(limit or len(members), len(members))
            kept += [members[i * len(members) // count] for i in range(count)]
        return replace(self, problems=tuple(kept))

    def halves(self) -> tuple[Suite, Suite]:
        """Every other problem of each kind: one half to choose with, one to check with.

        SuiteError if there is only one problem.
        """
        if len(self.problems) < 2:
            raise SuiteError(
                "one problem cannot be halved, to choose with one half and check with the other",
                found=self.problems[0].id,
                do="name more with --suite, or leave out --kinds and --limit",
            )
        ordered = tuple(sorted(self.problems, key=lambda p: p.kind))
        return replace(self, problems=ordered[::2]), replace(self, problems=ordered[1::2])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a text is the answer, and whether it is a loop that never ends."""

    right: bool
    degenerate: bool


def load_suite(path: Path | None = None) -> Suite:
    """Reads a suite file, one JSON object a line; None reads the suite that comes with the package.

    SuiteError if it cannot be read, has no problems, or a line (named by number) is not one.
    """
    name = "twotower-suite" if path is None else path.name
    try:
        data = (
            (resources.files("twotower.evaluate") / "data" / "suite.jsonl").read_bytes()
            if path is None
            else path.read_bytes()
        )
        lines = data.decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise SuiteError(
            f"cannot read the suite {path}", found=str(e), do=f"name a UTF-8 file; {_FORM}"
        ) from e
    problems = [
        _problem(f"{name}, line {number}", line, number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not problems:
        raise SuiteError(
            f"the suite {name} has no problems",
            found=f"{len(lines)} lines",
            do=_FORM,
        )
    twice = sorted(id_ for id_, count in Counter(p.id for p in problems).items() if count > 1)
    if twice:
        raise SuiteError(
            f"the suite {name} names problems twice",
            found=", ".join(twice[:5]),
            do="give every problem an id of its own",
        )
    return Suite(
        name,
        hashlib.sha256(data).hexdigest(),
        tuple(problems),
    )


def _problem(where: str, line: str, number: int) -> Problem:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise SuiteError(
            f"{where} is not JSON",
            found=str(e),
            do=_FORM,
        ) from e
    if isinstance(data, dict):
        data.setdefault("id", f"{number}")
    try:
        return decode(Problem, data)
    except RecordError as e:
        raise SuiteError(
            f"{where} is not a problem",
            found=str(e),
            do=_FORM,
        ) from e


def judge(problem: Problem, text: str, tokens: Sequence[int]) -> Verdict:
    """Whether a text is the answer (`exact`), or holds it and is no loop (`contains`)."""
    exact = text.strip() == problem.answer.strip()
    degenerate = not exact and is_degenerate(tokens)
    right = exact or (
        problem.match == "contains" and problem.answer.strip() in text and not degenerate
    )
    return Verdict(right, degenerate)


def is_degenerate(tokens: Sequence[int]) -> bool:
    """Whether a text ends in up to 16 tokens four times or more, 16 tokens at least."""
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // _REPEATS) + 1):
        count = max(_REPEATS * period, _REPEATED_TOKENS)
        tail = tokens[-count:]
        if len(tail) == count and all(tail[i] == tail[i - period] for i in range(period, count)):
            return True
    return False
