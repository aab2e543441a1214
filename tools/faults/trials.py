"""One fault in one command, and everything that must hold afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.faults.control import Fault
from tools.faults.verbs import Verb, listing
from tools.faults.worker import Ended, Worker

SECONDS = 120.0
"""A command that takes longer than this has hung: it takes one or two."""


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: `wrong` is empty if everything held."""

    what: str
    ended: Ended
    wrong: tuple[str, ...]


@dataclass
class Bench:
    """A worker with templates of what verbs read.

    Attributes:
        worker: Runs the commands.
        templates: What `prepare` made.
        scratch: A folder for trials.
    """

    worker: Worker
    templates: Path
    scratch: Path
    _whole: dict[str, set[str]] = field(default_factory=dict)

    def measure(self, verb: Verb, fault: Fault | None = None) -> Ended:
        """An undisturbed run, which counts calls; remembers what it leaves."""
        with self._place(verb) as place:
            ended = self.worker.run(verb.words(place), fault and _within(fault, place))
            if ended.code:
                raise SystemExit(f"twotower {verb.name} fails by itself:\n{ended.words}")
            self._whole[verb.name] = set(listing(place))
        return ended

    def kill(
        self, verb: Verb, *, after: float | None = None, fault: Fault | None = None
    ) -> Outcome:
        """A run that is killed, after some seconds or at a system call."""
        with self._place(verb) as place:
            before = self._sources(verb, place)
            ended = self.worker.run(
                verb.words(place), fault and _within(fault, place), kill_after=after
            )
            wrong = self._afterwards(verb, place, before)
        at = f"after {after:.3f} s" if fault is None else f"at call {fault.at}"
        return Outcome(f"{verb.name} killed {at}", ended, tuple(wrong))

    def fail(self, verb: Verb, fault: Fault) -> Outcome:
        """A run in which a system call fails: it says so, or does without."""
        with self._place(verb) as place:
            before = self._sources(verb, place)
            ended = self.worker.run(verb.words(place), _within(fault, place))
            wrong = words_wrong(ended)
            if ended.code == 0 and verb.absent(place):
                wrong.append("exit code 0 without a result")
            wrong += self._afterwards(verb, place, before)
        kind = fault.kinds.name or "changes"
        what = f"{verb.name}, errno {fault.error} at {kind.lower()} {fault.at}"
        return Outcome(what, ended, tuple(wrong))

    @contextmanager
    def _place(self, verb: Verb) -> Iterator[Path]:
        """A fresh folder with the verb's sources."""
        place = self.scratch / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for name in verb.sources:
            source = self.templates / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, place / name)
        yield place
        shutil.rmtree(place, ignore_errors=True)

    def _sources(self, verb: Verb, place: Path) -> dict[str, str]:
        found = listing(place, verb.changes)
        return {n: d for n, d in found.items() if n.split("/")[0] in verb.sources}

    def _afterwards(self, verb: Verb, place: Path, before: dict[str, str]) -> list[str]:
        """What is wrong: with sources and result now, and with the next run of the same command."""
        wrong = []
        if self._sources(verb, place) != before:
            wrong.append("the sources changed")
        if problem := verb.problem(place):
            wrong.append(problem)
        words = verb.words(place)
        again = self.worker.run(words)
        if again.code == 2 and "exist" in again.words and not verb.absent(place):
            pass  # the result was there, whole, and is not overwritten
        elif again.code:
            wrong.append(f"the next run: exit code {again.code}: {again.words.strip()[-300:]}")
        elif problem := verb.problem(place):
            wrong.append(f"after the next run the result {problem}")
        elif verb.absent(place):
            wrong.append("the next run leaves no result")
        if again.code == 0 and (left := set(listing(place)) - self._whole[verb.name]):
            wrong.append(f"left behind after the next run: {sorted(left)[:4]}")
        if self._sources(verb, place) != before:
            wrong.append("the next run changed the sources")
        return wrong


def words_wrong(ended: Ended) -> list[str]:
    """What is wrong with how a command that met an error ended."""
    if ended.code not in (0, 2):
        return [f"exit code {ended.code}: {ended.words.strip()[-300:]}"]
    if ended.code == 2 and not all(f"\n  {part}: " in ended.words for part in ("found", "do")):
        return [f"no error of three parts: {ended.words.strip()[-300:]}"]
    return []


def _within(fault: Fault, place: Path) -> Fault:
    """The fault on the trial's folder, or on the part of it that is named."""
    return Fault(place / fault.under, fault.kinds, fault.at, fault.error, fault.sticky)
