"""`twotower doctor`: what this machine can run, and whether it computes right."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError
from twotower.hardware import Machine, probe_machine

__all__ = ["add_arguments", "run"]

EXIT_FAILED = 1
COMMAND = (sys.executable, "-m", "twotower.cli", "doctor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        nargs="?",
        help="also check this bundle and its engines (default: a small random model)",
    )
    parser.add_argument(
        "--target",
        metavar="T",
        help="the engines to check (default: the best that fits; with --report every one that does)",
    )
    parser.add_argument(
        "--report",
        metavar="FOLDER",
        help="check every target that runs here, each in a process of its own, time its passes, and write results.json, "
        "logs.tar.gz and <device>.md into FOLDER",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    for name in (
        "--section",
        "--answers",
        "--seconds",
    ):  # how a report starts the process of a section
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.epilog = (
        "Exit code 1 if a check fails. Without BUNDLE a small model goes through the whole chain. The answers of a bundle's ort-cpu\n"
        "engine are kept in the bundle, for its other engines to match; a wrong one is compared with what is publicly known to go wrong.\n"
        "A report holds no text of yours and no names of people, machines or folders (docs/gpu/README.md lists what is in it).\n"
        "example: twotower doctor bundle --report report"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.doctor.machine import machine_facts

    machine = probe_machine()
    if args.section:
        return _section(args, machine)
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
    for check in _reported(args, machine, facts) if args.report else _checked(args, machine):
        facts["checks"].append(check)
        failed = failed or check["ok"] is False
        if not args.json:
            mark = {True: "ok    ", False: "FAILED", None: "note  "}[check["ok"]]
            print(f"{mark}  {check['name']}: {check['detail']}", flush=True)
    if args.json:
        print(json.dumps(facts))
    return EXIT_FAILED if failed else 0


def _checked(args: argparse.Namespace, machine: Machine) -> Iterator[dict[str, Any]]:
    """The checks of one target, in this process."""
    from twotower.cli.progress import ProgressLine, opening
    from twotower.doctor.target_checks import TargetChecks

    line = ProgressLine()
    checks = TargetChecks(
        machine=machine,
        bundle=Path(args.bundle) if args.bundle else None,
        target=args.target,
        **opening(line),
        opened=line.end,
        say=lambda what: print(f"... {what}", file=sys.stderr) if sys.stderr.isatty() else None,
    )
    for result in checks.run():
        yield {
            "name": result.name,
            "ok": result.ok,
            "detail": result.detail,
            "target": checks.target,
        }


def _reported(
    args: argparse.Namespace, machine: Machine, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The checks of all sections of a report, whose archive is written as they come."""
    from twotower.doctor.report import make_report

    for answers in make_report(Path(args.report), machine, _options(args)):
        facts["passes"] += answers.get("passes", [])
        yield from answers.get("checks", [])
    print(
        f"wrote results.json, logs.tar.gz and the page of the device into {args.report}",
        file=sys.stderr,
    )


def _section(args: argparse.Namespace, machine: Machine) -> int:
    """One section of a report, in the process that was started for it."""
    from twotower.doctor.report import answer_report_section

    return answer_report_section(
        args.section,
        _options(args),
        machine=machine,
        file=Path(args.answers),
        seconds=float(args.seconds),
    )


def _options(args: argparse.Namespace) -> Any:
    from twotower.doctor.report import ReportOptions

    return ReportOptions(
        command=COMMAND, bundle=Path(args.bundle) if args.bundle else None, target=args.target
    )


def _described(facts: dict[str, Any]) -> list[str]:
    gpus = (
        ", ".join(
            f"{g['name']} (SM {g['sm']}, {g['memory_bytes'] / 2**30:.0f} GiB)"
            for g in facts["gpus"]
        )
        or "no NVIDIA GPU"
    )
    libraries = (
        ", ".join(f"{k} {v}" for k, v in facts["libraries"].items()) or "no inference library"
    )
    lines = [
        f"twotower    {facts['twotower']}, Python {facts['python']}, {facts['system']}",
        f"machine     {facts['cpus']} CPUs, {facts['memory_bytes'] / 2**30:.0f} GiB, {gpus}",
        f"libraries   {libraries}",
        *(
            f"{'targets' if i == 0 else '':<12}{target}: {why}"
            for i, (target, why) in enumerate(facts["targets"].items())
        ),
    ]
    return [*lines, f"CONFLICT    {facts['conflict']}"] if facts["conflict"] else lines
