"""The first hour on a GPU: independent questions, an archive of answers, the page of the device.

`make gpu-first-hour` runs this, on a GPU machine with an environment of the project's own or with a
pack that `make gpu-pack` has made elsewhere. Every section is a process with its own time limit.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.gpu.questions import QUESTIONS, Given
from twotower.doctor import (
    Answers,
    Archive,
    Section,
    SkipSectionError,
    answer_section,
    ask_section,
    write_page,
)
from twotower.doctor.scrub import Scrubber
from twotower.doctor.sections import NOT_ASKED
from twotower.errors import ConfigError, EngineMismatchError, TwoTowerError
from twotower.hardware import Machine, probe_machine

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "gpu"
MADE_BY = "make gpu-first-hour"
EXIT_USER_ERROR = 2
COMMAND = (sys.executable, "-m", "tools.gpu.first_hour")
"""What starts the process of a section."""

_LEAST_SECONDS = 10.0
"""A section is not begun with less time than this."""


def main(argv: Sequence[str] | None = None) -> int:
    """Asks the sections, or answers one in the process started for it; returns the exit code."""
    args = _parser().parse_args(argv)
    given = Given(
        name=args.section or "",
        pack=tuple(_packs(args.pack)),
        work=Path(args.work) if args.work else Path(),
    )
    if args.section:
        return answer_section(lambda answers: _ask(answers, given), args.answers, args.seconds)
    try:
        _first_hour(args, given, probe_machine())
    except TwoTowerError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=MADE_BY, description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "gpu-first-hour",
        metavar="FOLDER",
        help="gets results.json, logs.tar.gz and the page (out/gpu-first-hour)",
    )
    parser.add_argument(
        "--sections",
        metavar="A,B",
        help="the sections to ask, in this order (default: those that a pack which was brought is "
        f"for, or all without one), of: {', '.join(QUESTIONS)}",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="begin and end within so much time (%(default)s)",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        nargs="*",
        default=[ROOT / "out" / "gpu-pack"],
        metavar="FOLDER",
        help="folders with what `make gpu-pack` prepared (out/gpu-pack)",
    )
    parser.add_argument(
        "--pages",
        type=Path,
        default=PAGES,
        metavar="FOLDER",
        help="also write the page of the device here (docs/gpu)",
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def _packs(folders: Sequence[Path]) -> list[Path]:
    """The parts of packs: `call1`, `call2` inside a folder, or the folder itself."""
    found = []
    for folder in folders:
        found += sorted(folder.glob("call*")) or ([folder] if folder.is_dir() else [])
    return found


def _first_hour(args: argparse.Namespace, given: Given, machine: Machine) -> None:
    names = args.sections.split(",") if args.sections else _default_sections(given)
    unknown = [name for name in names if name not in QUESTIONS]
    if unknown:
        raise ConfigError(
            f"there is no section {', '.join(unknown)}",
            found=f"sections: {', '.join(QUESTIONS)}",
            do="choose of these with --sections",
        )
    if not machine.gpus:
        raise EngineMismatchError(
            "no GPU",
            found=f"{machine.cpus} CPUs and no GPU that NVIDIA's driver shows",
            do="run this on a machine with an NVIDIA GPU; `make gpu-pack` prepares what one "
            "without a network needs",
        )
    end = time.monotonic() + args.budget
    archive = Archive(args.out, machine.gpus[0].name, MADE_BY, Scrubber())
    with tempfile.TemporaryDirectory(prefix="first-hour-") as work:
        for name in names:
            result = _asked(name, args, Path(work), left=end - time.monotonic())
            archive.add(name, result)
            _print(name, result)
        archive.finish(Path(work))
    page = write_page(args.pages, archive.results)
    print(f"wrote {args.out}/results.json, {args.out}/logs.tar.gz and {page}")


def _default_sections(given: Given) -> list[str]:
    """Those that the parts of a pack are for; all where there is none."""
    calls = {folder.name for folder in given.pack}
    brought = [name for name, question in QUESTIONS.items() if f"call{question.call}" in calls]
    return brought or list(QUESTIONS)


def _asked(name: str, args: argparse.Namespace, work: Path, *, left: float) -> dict[str, Any]:
    """The result of a section in a process of its own; not asked if there is no time left."""
    question = QUESTIONS[name]
    if left < _LEAST_SECONDS:
        answers = {"reason": f"{max(left, 0):.0f} s were left"}
        return {"question": question.text, "state": NOT_ASKED, "seconds": 0.0, "answers": answers}
    words = ("--section", name, "--work", str(work), "--pack", *map(str, args.pack))
    command = (*COMMAND, *words)
    section = Section(name=name, question=question.text, seconds=question.seconds, command=command)
    return ask_section(section, work, seconds=left, environment=_environment(work))


def _environment(work: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def _ask(answers: Answers, given: Given) -> None:
    """Imports the section's module, which may need a library that is not here, and asks it."""
    try:
        module = importlib.import_module(QUESTIONS[given.name].module)
    except ImportError as e:
        if (e.name or "").split(".")[0] in ("tools", "twotower"):
            raise
        raise SkipSectionError(f"a library is not installed: {e}") from e
    ask: Callable[[Answers, Given], None] = module.ask
    ask(answers, given)


def _print(name: str, result: dict[str, Any]) -> None:
    """A section in a few lines; all of it is in results.json."""
    print(f"== {name}: {result['state']}, {result['seconds']:g} s")
    answers = result["answers"]
    why = [str(answers[key]) for key in ("reason", "error") if key in answers]
    for line in (*answers.get("summary", []), *why, *result.get("last_words", [])):
        print(f"   {' '.join(line.split())[:400]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
