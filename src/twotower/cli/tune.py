"""`twotower tune`: the fastest settings that keep the quality asked for, stored as presets in a copy of the bundle."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

__all__ = ["add_arguments", "run"]

EXIT_NO_SETTING = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from twotower.cli.evaluate import add_suite_arguments

    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        help="a bundle with built engines and a tokenizer; it is not changed",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="BUNDLE2",
        help="the folder to make: the same bundle with presets (files are linked)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=98.7,
        metavar="P",
        help="percent of autoregression's right answers to keep (%(default)s)",
    )
    parser.add_argument(
        "--loose",
        type=float,
        default=5.0,
        metavar="P",
        help="points that the preset `fast` may lose beyond it (%(default)s)",
    )
    add_suite_arguments(parser)
    grid = parser.add_argument_group("what to try")
    grid.add_argument(
        "--thresholds", metavar="X,Y", help="commit thresholds (default: 13 from 0.3 to 0.99)"
    )
    grid.add_argument("--steps", metavar="N,M", help="most passes a block (default: 3,4,6,16)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the presets and all measurements as one JSON object on stdout",
    )
    parser.epilog = (
        "Presets are chosen on one half of the problems and checked on the other. `balanced` becomes the default;\n"
        "`twotower generate BUNDLE2 --preset fast` uses another. Exit code 3: no setting keeps the budget.\n"
        "example: twotower tune bundle --budget 98.7 -o tuned"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.bundle import Bundle, derive_bundle
    from twotower.cli.evaluate import chosen_suite, numbers
    from twotower.cli.options import device_options
    from twotower.cli.progress import ProgressLine, opening
    from twotower.errors import BudgetError, BundleError
    from twotower.evaluate.tune import TuneConfig, tune
    from twotower.runtime import TwoTower

    output, base = Path(args.output), TuneConfig()
    config = TuneConfig(
        budget=args.budget,
        loose=args.loose,
        thresholds=numbers(args.thresholds, "--thresholds") if args.thresholds else base.thresholds,
        steps=tuple(int(n) for n in numbers(args.steps, "--steps")) if args.steps else base.steps,
        max_new_tokens=args.max_new_tokens,
    )
    suite = chosen_suite(args)
    if output.exists():
        raise BundleError(
            f"the output folder '{output}' exists already",
            found="a bundle is never overwritten",
            do="name a new folder with -o",
        )
    line, checking = ProgressLine("problems"), ProgressLine()
    options = {
        "target": args.target,
        "threads": args.threads,
        **device_options(args),
        **opening(checking),
    }
    try:
        with TwoTower.open(args.bundle, **options) as model:
            checking.end()
            tuned = tune(model, suite, config, line)
            tuned.report["auto"] = replace(model.pass_record(), passes=tuned.passes).to_json()
    except BudgetError as e:
        print(f"BudgetError: {e}", file=sys.stderr)
        return EXIT_NO_SETTING
    finally:
        line.end()
    bundle = Bundle.open(args.bundle, contents=False)
    derive_bundle(
        bundle, output, presets=tuned.presets, default="balanced", reports={"tune": tuned.report}
    )
    if args.json:
        print(json.dumps(tuned.report))
        return 0
    print(
        f"{'preset':<10}{'threshold':>10}{'steps':>7}   {'chosen on: kept, speed':<26}{'checked on: kept, speed':<26}"
    )
    for name, facts in tuned.report["presets"].items():
        how = (
            f"{facts['config']['confidence_threshold']:>10g}{facts['config']['steps_per_block']:>7}"
        )
        figures = [
            f"{facts[half]['retention']['value']:.1f} %, {facts[half]['speedup']['value']:.2f}x"
            for half in ("choice", "check")
        ]
        print(f"{name:<10}{how}   {figures[0]:<26}{figures[1]:<26}")
    if not tuned.holds:
        print(
            f"note: `balanced` keeps less than {args.budget:g} % on the half it was not chosen with; ask for a higher --budget",
            file=sys.stderr,
        )
    print(f"{output}: default preset `balanced`", file=sys.stderr)
    return 0
