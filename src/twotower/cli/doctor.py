"""`twotower doctor`: what this machine can run, and whether it computes right."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

from twotower.hardware import TARGETS, Machine, probe_machine, select_target

__all__ = ["add_arguments", "run"]

EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="also check this bundle and its engines (default: a small random model)"
    )
    parser.add_argument("--target", metavar="T", help="of the bundle: the engines to check")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.epilog = (
        "Exit code 1 if a check fails. Without BUNDLE a small model goes through the whole chain.\nexample: twotower doctor bundle"
    )


def run(args: argparse.Namespace) -> int:
    from twotower import __version__

    machine = probe_machine()
    facts: dict[str, Any] = {
        "twotower": __version__,
        "python": platform.python_version(),
        "system": machine.system,
        "cpus": machine.cpus,
        "memory_bytes": machine.memory,
        "gpus": [{"name": g.name, "sm": g.sm, "memory_bytes": g.memory} for g in machine.gpus],
        "libraries": dict(machine.libraries),
        "conflict": machine.conflict,
        "targets": _targets(machine),
        "checks": [],
    }
    if not args.json:
        print("\n".join(_described(facts)))
    failed = machine.conflict is not None
    for result in _checks(args):
        facts["checks"].append({"name": result.name, "ok": result.ok, "detail": result.detail})
        failed = failed or result.ok is False
        if not args.json:
            mark = {True: "ok    ", False: "FAILED", None: "note  "}[result.ok]
            print(f"{mark}  {result.name}: {result.detail}", flush=True)
    if args.json:
        print(json.dumps(facts))
    return EXIT_FAILED if failed else 0


def _checks(args: argparse.Namespace) -> Any:
    from twotower.cli.progress import ProgressLine

    if args.bundle is None:
        from twotower.evaluate import check_chain

        yield from check_chain(lambda what: print(f"... {what}", file=sys.stderr) if sys.stderr.isatty() else None)
        return
    from twotower.evaluate import check_bundle
    from twotower.runtime import TwoTower

    line = ProgressLine()
    with TwoTower.open(args.bundle, target=args.target, progress=lambda done, total: line("checking the bundle", done, total)) as model:
        line.end()
        yield from check_bundle(model)


def _targets(machine: Machine) -> dict[str, str]:
    """For every target, whether this machine could run it once it is built."""
    from twotower.errors import EngineMismatchError

    out = {}
    for target in TARGETS:
        try:
            select_target(machine, TARGETS, wanted=target)
            out[target] = "can run here"
        except EngineMismatchError as e:
            out[target] = e.found.removeprefix(f"{target}: ")
    return out


def _described(facts: dict[str, Any]) -> list[str]:
    gpus = ", ".join(f"{g['name']} (SM {g['sm']}, {g['memory_bytes'] / 2**30:.0f} GiB)" for g in facts["gpus"]) or "no NVIDIA GPU"
    libraries = ", ".join(f"{k} {v}" for k, v in facts["libraries"].items()) or "no inference library"
    lines = [
        f"twotower    {facts['twotower']}, Python {facts['python']}, {facts['system']}",
        f"machine     {facts['cpus']} CPUs, {facts['memory_bytes'] / 2**30:.0f} GiB, {gpus}",
        f"libraries   {libraries}",
        *(f"{'targets' if i == 0 else '':<12}{target}: {why}" for i, (target, why) in enumerate(facts["targets"].items())),
    ]
    return [*lines, f"CONFLICT    {facts['conflict']}"] if facts["conflict"] else lines
