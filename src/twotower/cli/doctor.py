"""`twotower doctor`: what this machine can run, and whether it computes right."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError, EngineMismatchError, TwoTowerError
from twotower.hardware import TARGETS, Machine, probe_machine, select_target

__all__ = ["add_arguments", "run"]

EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="also check this bundle and its engines (default: a small random model)"
    )
    parser.add_argument(
        "--target", metavar="T", help="the engines to check (default: the best that fits; with --report every one that does)"
    )
    parser.add_argument(
        "--report", metavar="FOLDER", help="check every target that runs here, time its passes, and write FOLDER/<device>.md"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.epilog = (
        "Exit code 1 if a check fails. Without BUNDLE a small model goes through the whole chain. The answers of a bundle's ort-cpu\n"
        "engine are kept in the bundle, for its other engines to match; a wrong one is compared with what is publicly known to go wrong.\n"
        "example: twotower doctor bundle --report docs/gpu"
    )


def run(args: argparse.Namespace) -> int:
    machine = probe_machine()
    if args.report and not Path(args.report).is_dir():
        raise ConfigError("the report cannot be written", found=f"no folder {args.report}", do="name a folder that exists with --report")
    facts = _facts(machine)
    targets = _chosen(args, machine)
    if not args.json:
        print("\n".join(_described(facts)))
    failed = machine.conflict is not None
    for target in targets:
        for result in _all_checks(args, machine, target, facts):
            facts["checks"].append({"name": result.name, "ok": result.ok, "detail": result.detail, "target": facts["checked"]})
            failed = failed or result.ok is False
            if not args.json:
                mark = {True: "ok    ", False: "FAILED", None: "note  "}[result.ok]
                print(f"{mark}  {result.name}: {result.detail}", flush=True)
    if args.report:
        _write_page(args, machine, facts)
    if args.json:
        print(json.dumps(facts))
    return EXIT_FAILED if failed else 0


def _facts(machine: Machine) -> dict[str, Any]:
    from twotower import __version__

    return {
        "twotower": __version__,
        "python": platform.python_version(),
        "system": machine.system,
        "processor": machine.processor,
        "cpus": machine.cpus,
        "memory_bytes": machine.memory,
        "driver": machine.driver,
        "gpus": [{"name": g.name, "sm": g.sm, "memory_bytes": g.memory} for g in machine.gpus],
        "libraries": dict(machine.libraries),
        "conflict": machine.conflict,
        "targets": _targets(machine, TARGETS),
        "checks": [],
        "passes": [],
    }


def _chosen(args: argparse.Namespace, machine: Machine) -> list[str | None]:
    """The targets to check; None lets the bundle choose its best."""
    if args.target or not args.report:
        return [args.target or (None if args.bundle else "ort-cpu")]
    built: tuple[str, ...] = TARGETS
    if args.bundle:
        built = tuple(t for t in TARGETS if (Path(args.bundle) / "engines" / t / "build.json").is_file())
    return [t for t, why in _targets(machine, built).items() if why == RUNS] or [None]


def _all_checks(args: argparse.Namespace, machine: Machine, target: str | None, facts: dict[str, Any]) -> Iterator[Any]:
    """A report shows every target, also one that cannot be opened."""
    facts["checked"] = target
    if not args.report:
        yield from _checks(args, machine, target, facts)
        return
    from twotower.evaluate import CheckResult

    try:
        yield from _checks(args, machine, target, facts)
    except TwoTowerError as e:
        yield CheckResult("runs", False, str(e))


def _checks(args: argparse.Namespace, machine: Machine, target: str | None, facts: dict[str, Any]) -> Iterator[Any]:
    from twotower.cli.progress import ProgressLine

    if args.bundle is None:
        from twotower.evaluate import check_chain

        yield from check_chain(lambda what: print(f"... {what}", file=sys.stderr) if sys.stderr.isatty() else None, target or "ort-cpu")
        return
    from twotower.evaluate import KEPT_BY, check_bundle, check_execution
    from twotower.runtime import TwoTower

    line = ProgressLine()
    with TwoTower.open(args.bundle, target=target, progress=lambda done, total: line("checking the bundle", done, total)) as model:
        line.end()
        facts["checked"], facts["bundle"] = model.target, Path(args.bundle).resolve().name
        yield from check_bundle(model)
        yield from _answer(args, machine, model)
        if args.report:
            facts["passes"].append(_passes(args, model))
    if args.report and facts["checked"] != KEPT_BY:
        chosen = facts["checked"]
        yield from check_execution(lambda **options: TwoTower.open(args.bundle, target=chosen, **options), devices=len(machine.gpus))


def _answer(args: argparse.Namespace, machine: Machine, model: Any) -> Iterator[Any]:
    """The known answer of the bundle, by this engine."""
    from twotower.bundle import Bundle
    from twotower.evaluate import KEPT_BY, CheckResult, check_answer, known_answer_of, setting_of
    from twotower.runtime import TwoTower

    bundle = Bundle.open(args.bundle, contents=False)
    known, source = known_answer_of(
        bundle, lambda: nullcontext(model) if model.target == KEPT_BY else TwoTower.open(args.bundle, target=KEPT_BY)
    )
    yield CheckResult("where the known answer comes from", None, source)
    if known is None:
        return
    on_gpu = model.target != KEPT_BY
    setting = setting_of(bundle, model.target, machine.gpus[0].sm if on_gpu and machine.gpus else None)
    without_graphs: dict[str, Any] = {"target": model.target, "graphs": False}
    plain = (lambda: TwoTower.open(args.bundle, **without_graphs)) if on_gpu else None
    yield from check_answer(known, model, setting, open_plain=plain)


def _passes(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    from twotower.bench import measure_passes
    from twotower.bundle import Bundle
    from twotower.evaluate import setting_of

    bundle = Bundle.open(args.bundle, contents=False)
    return {"target": model.target, "dtype": setting_of(bundle, model.target).dtype, **measure_passes(bundle, model).to_json()}


def _write_page(args: argparse.Namespace, machine: Machine, facts: dict[str, Any]) -> None:
    from twotower.evaluate.device_page import write_device_page

    on_gpu = machine.gpus and args.target != "ort-cpu"
    file = write_device_page(Path(args.report), facts, machine.gpus[0].name if on_gpu else machine.processor)
    print(f"wrote {file}", file=sys.stderr)


RUNS = "can run here"


def _targets(machine: Machine, built: tuple[str, ...]) -> dict[str, str]:
    """For every target, whether this machine can run it, or could once it is built."""
    out = {}
    for target in TARGETS:
        try:
            select_target(machine, built, wanted=target)
            out[target] = RUNS
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
