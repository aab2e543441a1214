"""The verbs that write: how each is run, what it reads, and when its result is whole.

A list to add to: every fault is tried on every entry.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.faults.worker import ROOT, Worker
from twotower.bundle import Bundle, load_engine_record
from twotower.calibration.activation_statistics import read_statistics
from twotower.errors import TwoTowerError

SMALL = ROOT / "tests" / "fixtures" / "hybrid-a"
TRAINED = ROOT / "assets" / "twotower-tiny"
TARGET = "ort-cpu"


@dataclass(frozen=True)
class Verb:
    """One way to call a verb.

    Attributes:
        name: The verb.
        arguments: Its arguments; `{}` is the folder everything is in.
        sources: What it reads, of what `prepare` makes: copied into that folder, and not to change.
        absent: Whether the folder has nothing that looks like a result.
        check: Raises, or returns False, if the result is not whole.
        changes: Of the sources, what it may add to: paths that begin so are not compared.
    """

    name: str
    arguments: Sequence[str]
    sources: Sequence[str]
    absent: Callable[[Path], bool]
    check: Callable[[Path], bool]
    changes: str | None = None

    def words(self, folder: Path) -> list[str]:
        """The command line in a folder."""
        return [self.name, *(word.replace("{}", str(folder)) for word in self.arguments)]

    def problem(self, folder: Path) -> str | None:
        """What is wrong with what lies under the result's name; None if it is whole, or not there."""
        if self.absent(folder):
            return None
        try:
            return None if self.check(folder) else "looks whole and is not"
        except (TwoTowerError, ValueError, OSError, KeyError) as e:
            return f"looks whole and is not: {e}"


def _no_file(name: str) -> Callable[[Path], bool]:
    return lambda folder: not (folder / name).exists()


def _bundle(name: str) -> Callable[[Path], bool]:
    def check(folder: Path) -> bool:
        bundle = Bundle.open(folder / name)
        return all(digest(folder / name / n) == r.sha256 for n, r in bundle.files.items())

    return check


def _no_engine(folder: Path) -> bool:
    return not (folder / "bundle" / "engines" / TARGET / "build.json").exists()


def _engine(folder: Path) -> bool:
    bundle = Bundle.open(folder / "bundle")
    record = load_engine_record(bundle, TARGET)
    place = folder / "bundle" / "engines" / TARGET
    return all(digest(place / name) == file.sha256 for name, file in record.files.items())


def _statistics(folder: Path) -> bool:
    read_statistics(folder / "stats")
    return True


def _report(folder: Path) -> bool:
    report = folder / "report.json"
    page = folder / "report.html"
    if report.exists():
        json.loads(report.read_text(encoding="utf-8"))
    return not page.exists() or page.read_text(encoding="utf-8").rstrip().endswith("</html>")


_FEW = ("--kinds", "letter", "--limit", "2", "--max-new-tokens", "64", "--threads", "1")

VERBS = (
    Verb(
        "export",
        ("{}/checkpoint", "-o", "{}/bundle"),
        ("checkpoint",),
        _no_file("bundle"),
        _bundle("bundle"),
    ),
    Verb(
        "quantize",
        ("{}/bundle", "--recipe", "int8-weights", "-o", "{}/quantized"),
        ("bundle",),
        _no_file("quantized"),
        _bundle("quantized"),
    ),
    Verb("build", ("{}/bundle",), ("bundle",), _no_engine, _engine, changes="bundle/engines"),
    Verb(
        "calibrate",
        (
            *("{}/built", "--prompts", "{}/prompts.jsonl", "-o", "{}/stats"),
            *("--no-plot", "--max-new-tokens", "16"),
        ),
        ("built", "prompts.jsonl"),
        _no_file("stats"),
        _statistics,
        changes="built/engines",  # one that cannot be read is built again
    ),
    Verb(
        "tune",
        (
            "{}/trained",
            "-o",
            "{}/tuned",
            "--thresholds",
            "0.9",
            "--steps",
            "16",
            *_FEW,
        ),
        ("trained",),
        _no_file("tuned"),
        _bundle("tuned"),
    ),
    Verb(
        "evaluate",
        (
            *("{}/trained", "--html", "{}/report.html"),
            *("--thresholds", "0.9", "--steps", "16", "--no-likelihood", *_FEW),
        ),
        ("trained",),
        _no_file("report.json"),
        _report,
    ),
)


def prepare(worker: Worker, folder: Path) -> None:
    """Makes everything that some verb reads, in a folder of templates."""
    folder.mkdir()
    shutil.copytree(SMALL, folder / "checkpoint")
    prompts = "".join(json.dumps({"tokens": [5, 6, 7 + n]}) + "\n" for n in range(4))
    (folder / "prompts.jsonl").write_text(prompts)
    export = ("export", "--dtype", "float32", "--no-verify", "-o")
    _run(worker, *export, str(folder / "bundle"), str(SMALL))
    shutil.copytree(folder / "bundle", folder / "built")
    _run(worker, "build", str(folder / "built"))
    _run(worker, *export, str(folder / "trained"), str(TRAINED))
    _run(worker, "build", str(folder / "trained"))


def _run(worker: Worker, *words: str) -> None:
    ended = worker.run(words)
    if ended.code:
        raise SystemExit(f"twotower {' '.join(words)}: exit code {ended.code}\n{ended.words}")


def digest(file: Path) -> str:
    """SHA-256 of a file's content; not by the code that is on trial."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def listing(folder: Path, leave_out: str | None = None) -> dict[str, str]:
    """Every file below a folder by its path, with its SHA-256."""
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if not p.is_dir()}
    return {
        name: digest(path)
        for name, path in sorted(names.items())
        if leave_out is None or not name.startswith(leave_out)
    }
