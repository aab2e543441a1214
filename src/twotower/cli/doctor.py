"""`twotower doctor`: what this machine can run, and whether it computes correctly."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower.cli.options import adder
from twotower.errors import ConfigError
from twotower.hardware import Machine, probe_machine
from twotower.report.tables import labelled
from twotower.units import format_bytes

EXIT_FAILED = 1
COMMAND = (sys.executable, "-m", "twotower.cli", "doctor")
_MARKS = {True: "ok    ", False: "FAILED", None: "note  "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add(
        "bundle BUNDLE",
        "also check this bundle and its engines (default: a small random model)",
        nargs="?",
    )
    add(
        "--target T",
        "the engines to check (default: the best that fits; with --report every one that does)",
    )
    add(
        "--report FOLDER",
        "check every target that runs here, each in a process of its own, time its passes, "
        "and write results.json, logs.tar.gz and <device>.md into FOLDER",
    )
    add("--json", "print one JSON object on stdout")
    # How a report starts the process of a section.
    for name in ("--section", "--answers", "--seconds"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.epilog = (
        "Exit code 1 if a check fails. Without BUNDLE a small model is exported, built and run.\n"
        "The output of a bundle's ort-cpu engine is stored in the bundle as the reference for its\n"
        "other engines; docs/known-issues.md says what can be wrong.\n"
        "A report holds no text of yours and no names of people, machines or folders\n"
        "(docs/gpu/README.md lists what is in it).\n"
        "example: twotower doctor bundle --report report"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.doctor.machine import machine_facts
    from twotower.doctor.report import ReportOptions, answer_report_section

    machine = probe_machine()
    bundle = Path(args.bundle) if args.bundle else None
    options = ReportOptions(command=COMMAND, bundle=bundle, target=args.target)
    if args.section:
        return answer_report_section(
            args.section,
            options,
            machine=machine,
            file=Path(args.answers),
            seconds=float(args.seconds),
        )
    if args.report and not Path(args.report).is_dir():
        raise ConfigError(
            "the report cannot be written",
            found=f"no folder {args.report}",
            do="name a folder that exists with --report",
        )
    facts = machine_facts(machine)
    if not args.json:
        print("\n".join(_described(facts)))
    failed = machine.conflict is not None
    checks = (
        _reported(Path(args.report), machine, options, facts)
        if args.report
        else _checked(machine, options)
    )
    for check in checks:
        facts["checks"].append(check)
        failed = failed or check["ok"] is False
        if not args.json:
            print(f"{_MARKS[check['ok']]}  {check['name']}: {check['detail']}", flush=True)
    if args.json:
        print(json.dumps(facts))
    return EXIT_FAILED if failed else 0


def _checked(machine: Machine, options: Any) -> Iterator[dict[str, Any]]:
    """The checks of one target, in this process."""
    from twotower.cli.progress import ProgressLine, opening
    from twotower.doctor.target_checks import TargetChecks

    line = ProgressLine()
    checks = TargetChecks(
        machine=machine,
        bundle=options.bundle,
        target=options.target,
        **opening(line),
        opened=line.end,
        say=lambda what: print(f"... {what}", file=sys.stderr) if sys.stderr.isatty() else None,
    )
    for result in checks.run():
        yield result.facts(checks.target)


def _reported(
    folder: Path, machine: Machine, options: Any, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The checks of all sections of a report, whose archive is written as they come."""
    from twotower.doctor.report import make_report

    for answers in make_report(folder, machine, options):
        facts["passes"] += answers.get("passes", [])
        yield from answers.get("checks", [])
    print(
        f"wrote results.json, logs.tar.gz and the page of the device into {folder}",
        file=sys.stderr,
    )


def _described(facts: dict[str, Any]) -> list[str]:
    gpus = [
        f"{gpu['name']} (SM {gpu['sm']}, {format_bytes(gpu['memory_bytes'])})"
        for gpu in facts["gpus"]
    ]
    libraries = [f"{name} {version}" for name, version in facts["libraries"].items()]
    lines = [
        f"twotower    {facts['twotower']}, Python {facts['python']}, {facts['system']}",
        f"machine     {facts['cpus']} CPUs, {format_bytes(facts['memory_bytes'])}, "
        f"{', '.join(gpus) or 'no NVIDIA GPU'}",
        f"libraries   {', '.join(libraries) or 'no inference library'}",
        *labelled("targets", (f"{target}: {why}" for target, why in facts["targets"].items())),
    ]
    if facts["conflict"]:
        return [*lines, f"CONFLICT    {facts['conflict']}"]
    return lines
