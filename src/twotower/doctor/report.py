"""The report of `twotower doctor`: machine, CUDA and targets as the sections of an archive."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.doctor.archive import Archive
from twotower.doctor.checks import CheckResult
from twotower.doctor.cuda_layer import check_cuda, copy_rates
from twotower.doctor.machine import RUNS, put_machine, targets_here
from twotower.doctor.scrub import Scrubber
from twotower.doctor.sections import (
    OK,
    SKIPPED,
    Answers,
    Section,
    SkipSectionError,
    answer_section,
    ask_section,
    short,
)
from twotower.doctor.target_checks import TargetChecks
from twotower.errors import EngineMismatchError, TwoTowerError
from twotower.hardware import TARGETS, Machine
from twotower.report.tables import Column, number
from twotower.runtime.engines import open_cuda
from twotower.units import format_bytes

MADE_BY = "twotower doctor --report"
MACHINE, CUDA, TARGET = "machine", "cuda", "target"

_TARGET_SECONDS = 3600.0
"""A published model may have to be read from a slow disk, several times."""

_MARK = {True: "ok", False: "**FAILED**", None: "note"}
_PASS = (
    Column("target", of="target"),
    Column("type", of="dtype"),
    Column("context", of="context"),
    Column("denoiser pass", ".3f", " ms", of="denoise_ms"),
    Column("weights read", format_bytes, of="denoiser_bytes"),
    Column("GB/s", ".1f", of="denoise_gb_per_s"),
    Column("16-token extension and head", ".3f", " ms", of="extend_ms"),
    Column("weights read", format_bytes, of="context_bytes"),
    Column("GB/s", ".1f", of="extend_gb_per_s"),
    Column("runs", of="runs"),
)
_PASSES_NOTE = (
    "Medians of wall-clock times from the launch until the result is on the host, one row. Weights "
    "read are all weights of\nthe tower as the bundle stores them, and GB/s is that over the time, "
    "as if a pass read every weight once. No limit is claimed."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What a report looks at.

    `command` starts a section; it gets the bundle, `--target`, and `--section NAME` added. Without
    a bundle it is a small random model, without a target every one that runs here.
    """

    command: tuple[str, ...]
    bundle: Path | None = None
    target: str | None = None


def make_report(folder: Path, machine: Machine, options: ReportOptions) -> Iterator[dict[str, Any]]:
    """Asks the sections one after another and writes the archive as they are answered.

    Yields the answers of each section: `checks` and `passes`, where it has some.

    Raises:
        ConfigError: the archive cannot be written.
    """
    on_gpu = machine.gpus and options.target != "ort-cpu"
    device = machine.gpus[0].name if on_gpu else machine.processor
    private = {options.bundle.resolve(): "[bundle]"} if options.bundle else {}
    archive = Archive(folder, device, MADE_BY, Scrubber(private))
    with tempfile.TemporaryDirectory() as work:
        for section in _report_sections(machine, options):
            result = ask_section(section, Path(work))
            archive.add(section.name, result)
            yield _answers(section.name, result)
        archive.finish(Path(work))


def _report_sections(machine: Machine, options: ReportOptions) -> Iterator[Section]:
    """The sections of a report, in the order they are asked."""
    bundle = [str(options.bundle)] if options.bundle else []

    def section(name: str, question: str, seconds: float, *words: str) -> Section:
        command = (*options.command, *bundle, *words, "--section", name)
        return Section(name=name, question=question, seconds=seconds, command=command)

    yield section(MACHINE, "What is this machine?", 60)
    if machine.gpus:
        question = "Do copies, events and captured graphs work, and how fast are copies?"
        yield section(CUDA, question, 120)
    for target in _targets(machine, options):
        question = f"Does {target or 'the best target'} compute right, and how long is a pass?"
        words = ["--target", target] if target else []
        yield section(
            f"{TARGET}-{target or 'best'}",
            question,
            _TARGET_SECONDS,
            *words,
        )


def answer_report_section(
    name: str, options: ReportOptions, *, machine: Machine, file: Path, seconds: float
) -> int:
    """Answers one section in the process that was started for it; see `answer_section`."""
    if name == MACHINE:
        return answer_section(lambda answers: put_machine(answers, machine), file, seconds)
    if name == CUDA:
        return answer_section(_ask_cuda, file, seconds)
    checks = TargetChecks(
        machine=machine, bundle=options.bundle, target=options.target, report=True
    )
    return answer_section(lambda answers: _ask_target(answers, checks), file, seconds)


def _ask_cuda(answers: Answers) -> None:
    """The CUDA layer without an engine."""
    try:
        cuda = open_cuda()
    except EngineMismatchError as e:
        raise SkipSectionError(e.found) from e
    cuda.device_count()
    _put_checks(answers, check_cuda(cuda), lambda: None)
    rates = {name: short(rate) for name, rate in copy_rates(cuda).items()}
    answers.put(copy_gb_per_s=rates)
    answers.table(
        "Copies of 1 GiB",
        ("", "GB/s"),
        list(rates.items()),
    )


def _ask_target(answers: Answers, checks: TargetChecks) -> None:
    """Every check of a target; one that cannot be opened is a check that failed."""
    answers.put(target=checks.target)
    _put_checks(answers, checks.run(), lambda: checks.target)
    answers.put(target=checks.target, passes=checks.passes)
    if checks.passes:
        head = [column.heading for column in _PASS]
        rows = [
            [
                number(
                    facts[column.of],
                    column.spec,
                    column.unit,
                )
                for column in _PASS
            ]
            for facts in checks.passes
        ]
        answers.table("Time of a pass", head, rows, note=_PASSES_NOTE)


def _put_checks(
    answers: Answers, results: Iterator[CheckResult], target: Callable[[], str | None]
) -> None:
    """Writes each check as it is made, with its target, which may be known only once it is open."""
    made: list[dict[str, Any]] = []

    def put(result: CheckResult) -> None:
        made.append(result.facts(target()))
        answers.put(checks=made)
        answers.table(
            "Checks",
            ("check", "", "what was seen"),
            [(c["name"], _MARK[c["ok"]], c["detail"]) for c in made],
        )

    try:
        for result in results:
            put(result)
    except TwoTowerError as e:
        put(CheckResult("runs", False, str(e)))


def _targets(machine: Machine, options: ReportOptions) -> list[str | None]:
    """The targets to check; None lets the bundle choose its best."""
    if options.target:
        return [options.target]
    built: tuple[str, ...] = TARGETS
    if options.bundle:
        built = tuple(
            t for t in TARGETS if (options.bundle / "engines" / t / "build.json").is_file()
        )
    return [t for t, why in targets_here(machine, built).items() if why == RUNS] or [None]


def _answers(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A section's answers; one that did not end well has a check that says how."""
    answers: dict[str, Any] = result["answers"]
    if result["state"] in (OK, SKIPPED):
        return answers
    how = CheckResult(name, False, "; ".join(result["last_words"]))
    checks = [*answers.get("checks", []), how.facts(answers.get("target"))]
    return {**answers, "checks": checks}
