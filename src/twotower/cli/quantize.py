"""`twotower quantize`: a bundle in few bits, by a recipe or by measuring what a budget allows."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower.bundle import Bundle
    from twotower.calibration.statistics_file import Statistics

__all__ = ["add_arguments", "run"]

AUTO = "auto"
EXIT_BELOW_BUDGET = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from twotower.cli.evaluate import add_suite_arguments

    recipes = _summaries()
    parser.add_argument("bundle", metavar="BUNDLE", help="a float bundle; it is not changed")
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="R",
        help=f"{', '.join(recipes)}, auto, or a .toml file of your own",
    )
    parser.add_argument(
        "-o", "--output", metavar="BUNDLE2", help="the folder to make; needed but with --dry-run"
    )
    parser.add_argument(
        "--stats",
        metavar="STATS",
        help="statistics of `twotower calibrate`; int8 and fp8 need them, auto uses them",
    )
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="int4: weights that share a scale, 32, 64 or 128 (the recipe's)",
    )
    parser.add_argument(
        "--rounding",
        default="mse",
        metavar="W",
        help="of weights: plain, or mse: clip where it costs least (%(default)s)",
    )
    parser.add_argument(
        "--ranges",
        default="mse",
        metavar="W",
        help="of inputs: max, percentile or mse (%(default)s)",
    )
    parser.add_argument(
        "--calibrated-on",
        default="trajectories",
        metavar="W",
        help="trajectories, or text: finished blocks only, to compare (%(default)s)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be stored how, and what it takes; write nothing",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object on stdout"
    )
    auto = parser.add_argument_group(
        "--recipe auto: the smallest formats inside a budget of quality and passes, measured on problems"
    )
    auto.add_argument(
        "--budget",
        type=float,
        default=98.7,
        metavar="P",
        help="percent of the float bundle's right answers (%(default)s)",
    )
    auto.add_argument(
        "--max-inflation",
        type=float,
        default=5.0,
        metavar="P",
        help="percent of more passes a block (%(default)s)",
    )
    auto.add_argument(
        "--formats",
        default="int4,int8",
        metavar="A,B",
        help="to try, of int4, nvfp4, int8 and fp8 (%(default)s)",
    )
    add_suite_arguments(parser)
    parser.epilog = "\n".join(
        [
            "recipes:",
            *(f"  {name:<15}{summary}" for name, summary in recipes.items()),
            f"  {AUTO:<15}for each layer kind, then layer by layer, what --budget allows",
            "Exit code 3: auto found nothing inside the budget.",
            "example: twotower quantize bundle --recipe int4-experts -o q4",
        ]
    )


def _summaries() -> dict[str, str]:
    """The recipes that come along in a sentence each, without the libraries that make a bundle of them: for the help."""
    file = resources.files("twotower") / "calibration" / "data" / "recipes.toml"
    return {
        name: table["summary"]
        for name, table in tomllib.loads(file.read_text(encoding="utf-8")).items()
    }


def run(args: argparse.Namespace) -> int:
    from twotower.extras import require_libraries

    require_libraries("calibration", "onnx", "onnx_ir", "safetensors")
    from twotower.bundle import Bundle
    from twotower.calibration.quantize import (
        QuantizeConfig,
        plan_quantization,
        quantize_bundle,
        require_float,
    )
    from twotower.calibration.recipes import load_recipe
    from twotower.calibration.statistics_file import read_statistics
    from twotower.cli.progress import ProgressLine
    from twotower.errors import BundleError, ConfigError

    if not args.output and not args.dry_run:
        raise ConfigError(
            "there is no folder to write to",
            found="no -o",
            do="name the new bundle's folder with -o, or add --dry-run",
        )
    if args.output and Path(args.output).exists():
        raise BundleError(
            f"the output folder '{args.output}' exists already",
            found="a bundle is never overwritten",
            do="name a new folder with -o",
        )
    config = QuantizeConfig(
        rounding=args.rounding, ranges=args.ranges, calibrated_on=args.calibrated_on
    )
    line = ProgressLine()
    bundle = Bundle.open(
        args.bundle, progress=lambda done, total: line("checking the bundle", done, total)
    )
    require_float(bundle)
    statistics = read_statistics(Path(args.stats)) if args.stats else None
    if args.recipe == AUTO:
        line.end()
        return _auto(args, bundle, config, statistics)
    recipe = load_recipe(args.recipe)
    if args.group is not None:
        recipe = replace(recipe, group=args.group)
    plan = plan_quantization(bundle, recipe, config, statistics)
    if args.dry_run:
        line.end()
        _tell(args, bundle, plan.nbytes, {"recipe": recipe.to_json(), "name": recipe.name})
        return 0
    made = quantize_bundle(bundle, plan, Path(args.output), report=line)
    line.end()
    _tell(
        args,
        bundle,
        plan.nbytes,
        {"recipe": recipe.to_json(), "name": recipe.name, "precision": made.precision},
    )
    print(
        f"next: twotower build {args.output} --target ort-cpu, then twotower evaluate {args.output} --against {args.bundle}",
        file=sys.stderr,
    )
    return 0


def _tell(args: argparse.Namespace, bundle: Bundle, nbytes: int, facts: dict[str, Any]) -> None:
    from twotower.bundle import DATA_SUFFIX, GRAPH_FILES
    from twotower.cli.expert_words import expert_words
    from twotower.cli.progress import human_bytes

    before = sum(bundle.files[graph + DATA_SUFFIX].size for graph in GRAPH_FILES.values())
    if args.json:
        print(
            json.dumps(
                {
                    "output": args.output,
                    "weight_bytes": nbytes,
                    "weight_bytes_before": before,
                    **facts,
                }
            )
        )
        return
    share = f"{100 * nbytes / before:.0f} % of the {bundle.dtype} bundle's"
    print(
        f"{args.output or 'would be'}: {facts['name']}, {human_bytes(nbytes)} of weights, {share}"
    )
    # What stays as it is, parts this model does not have included, is most of the list and no news.
    for kind, how in facts.get("precision", facts["recipe"]["weights"]).items():
        if how not in (bundle.dtype, "float32"):
            print(f"  {kind:<15}{how}")
    print(f"  {'the rest':<15}as it was, {bundle.dtype}")
    for label, line in expert_words(facts["recipe"], bundle.dtype):
        print(f"  {label:<15}{line}")


def _auto(
    args: argparse.Namespace, bundle: Bundle, config: Any, statistics: Statistics | None
) -> int:
    import tempfile

    from twotower.extras import require_libraries

    require_libraries("calibration,cpu", "onnxruntime", what="measuring candidates (recipe auto)")
    from twotower.bundle import note_measurement
    from twotower.calibration.quantize import plan_quantization, quantize_bundle
    from twotower.cli.evaluate import chosen_suite
    from twotower.cli.progress import ProgressLine
    from twotower.errors import BudgetError
    from twotower.evaluate.quantization.choose import choose
    from twotower.evaluate.quantization.format_ladders import ChooseConfig
    from twotower.evaluate.quantization.price import PriceConfig

    price = PriceConfig(
        max_new_tokens=args.max_new_tokens, budget=args.budget, max_inflation=args.max_inflation
    )
    formats = tuple(word.strip() for word in args.formats.split(",") if word.strip())
    wanted = ChooseConfig(
        price=price, formats=formats, group=args.group or 32, threads=args.threads, quantize=config
    )
    suite, output = chosen_suite(args), Path(args.output or "auto")
    line, writing = ProgressLine("problems"), ProgressLine()
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.auto.", dir=parent) as scratch:
            choice = choose(
                bundle, suite, wanted, Path(scratch), statistics=statistics, progress=line
            )
    except BudgetError as e:
        line.end()
        print(f"BudgetError: {e}", file=sys.stderr)
        return EXIT_BELOW_BUDGET
    line.end()
    plan = plan_quantization(bundle, choice.recipe, config, statistics)
    facts = {"recipe": choice.recipe.to_json(), "name": "auto", "chosen": choice.report}
    if not args.dry_run:
        made = quantize_bundle(
            bundle, plan, output, report=writing, extra={"chosen": choice.report}
        )
        writing.end()
        check = choice.report["check"]
        names = ("retention", "passes_per_block", "inflation", "step_time", "speedup")
        about = {name: choice.report[name] for name in ("suite", "generation", "budget", "flags")}
        note_measurement(
            made, {**about, "target": "ort-cpu", **{name: check[name] for name in names}}
        )
        facts["precision"] = made.precision
    _tell(args, bundle, plan.nbytes, facts)
    if not args.json:
        print("\n".join(_choice_lines(choice.report)))
    for flag in choice.report["flags"]:
        print(f"note: on the half it was not chosen with, it {flag}", file=sys.stderr)
    return 0


def _choice_lines(report: dict[str, Any]) -> list[str]:
    from twotower.evaluate.evaluation import interval_text

    def more(facts: dict[str, Any]) -> str:
        return interval_text(
            {k: None if v is None else 100 * (v - 1) for k, v in facts["inflation"].items()}
        )

    lines = ["", f"{'alone':<16}{'in':<20}{'kept, 95 % interval':<26}more passes a block"]
    lines += [
        f"{r['kind']:<16}{r['candidate']:<20}{interval_text(r['retention']):<26}{more(r)}"
        for r in report["alone"]
    ]
    lines += [
        f"{len(report['tried'])} mixtures measured; {len(report['layers'])} layers treated otherwise than their kind"
    ]
    check = report["check"]
    return [
        *lines,
        f"checked on the other half: keeps {interval_text(check['retention'])} %, {more(check)} % more passes a block",
    ]
