"""`twotower tune`: the fastest settings inside a quality budget, as presets of a new bundle."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from twotower.cli.options import add_suite_options, adder, chosen_suite, number_list, opened_session
from twotower.cli.progress import ProgressLine

EXIT_NO_SETTING = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("bundle BUNDLE", "a bundle with built engines and a tokenizer; it is not changed")
    add(
        "-o --output BUNDLE2",
        "the folder to make: the same bundle with presets (files are hard links)",
        required=True,
    )
    add("--budget P", "percent of autoregression's right answers to keep", default=98.7)
    add(
        "--loose P", "percentage points below the budget that the preset `fast` may go", default=5.0
    )
    add_suite_options(parser)
    grid = adder(parser, "what to try")
    grid("--thresholds X,Y", "commit thresholds (default: 13 from 0.3 to 0.99)")
    grid("--steps N,M", "most passes a block (default: 3,4,6,16)")
    add("--json", "print the presets and all measurements as one JSON object on stdout")
    parser.epilog = (
        "Presets are chosen on one half of the problems and checked on the other. `balanced`\n"
        "becomes the default; `twotower generate BUNDLE2 --preset fast` uses another.\n"
        "Exit code 3: no setting keeps the budget.\n"
        "example: twotower tune bundle --budget 98.7 -o tuned"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.bundle import Bundle, derive_bundle
    from twotower.errors import BudgetError, BundleError
    from twotower.evaluate.evaluation_page import preset_lines
    from twotower.evaluate.tune import TuneConfig, tune
    from twotower.files import require_room

    output, base = Path(args.output), TuneConfig()
    thresholds = number_list(args.thresholds, "--thresholds", "0.8,0.9", float)
    steps = number_list(args.steps, "--steps", "4,16", int)
    config = TuneConfig(
        budget=args.budget,
        loose=args.loose,
        thresholds=thresholds or base.thresholds,
        steps=steps or base.steps,
        max_new_tokens=args.max_new_tokens,
    )
    suite = chosen_suite(args)
    require_room(output, 0, error=BundleError, smaller="or name another disk with -o")
    try:
        with ProgressLine("problems") as line, opened_session(args, args.bundle) as model:
            tuned = tune(model, suite, config, line)
            tuned.report["auto"] = replace(model.pass_record(), passes=tuned.passes).to_json()
    except BudgetError as e:
        print(f"BudgetError: {e}", file=sys.stderr)
        return EXIT_NO_SETTING
    bundle = Bundle.open(args.bundle, contents=False)
    derive_bundle(
        bundle, output, presets=tuned.presets, default="balanced", reports={"tune": tuned.report}
    )
    if args.json:
        print(json.dumps(tuned.report))
        return 0
    print("\n".join(preset_lines(tuned.report["presets"])))
    if not tuned.holds:
        print(
            f"note: `balanced` keeps less than {args.budget:g} % on the half it was not chosen "
            "with; ask for a higher --budget",
            file=sys.stderr,
        )
    print(f"{output}: default preset `balanced`", file=sys.stderr)
    return 0
