"""`twotower quantize`: a bundle in low-bit formats, by a recipe or by a search within a budget."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.options import add_suite_options, adder, checked_bundle, chosen_suite
from twotower.cli.progress import ProgressLine

if TYPE_CHECKING:
    from twotower.bundle import Bundle
    from twotower.calibration.activation_statistics import Statistics
    from twotower.calibration.quantization_plan import QuantizeConfig

AUTO = "auto"
EXIT_BELOW_BUDGET = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    # The libraries that quantize are not needed for the help.
    file = resources.files("twotower") / "calibration" / "data" / "recipes.toml"
    recipes = tomllib.loads(file.read_text(encoding="utf-8"))
    add("bundle BUNDLE", "a float bundle; it is not changed")
    add(
        "--recipe R",
        f"{', '.join(recipes)}, auto, or a .toml file of your own",
        required=True,
    )
    add("-o --output BUNDLE2", "the folder to make; not needed with --dry-run")
    add(
        "--stats STATS",
        "statistics of `twotower calibrate`; int8 and fp8 need them, auto uses them",
    )
    add("--group N", "int4: weights that share a scale, 32, 64 or 128 (the recipe's)", type=int)
    add(
        "--rounding W",
        "how weights are quantized: plain, or mse, which clips where that lowers the error",
        default="mse",
    )
    add("--ranges W", "how activation ranges are chosen: max, percentile or mse", default="mse")
    add(
        "--calibrated-on W",
        "statistics to use: trajectories, those of all denoising passes, or text, those of "
        "finished blocks only, to compare",
        default="trajectories",
    )
    add(
        "--dry-run", "print the format of each layer kind and the size of the result; write nothing"
    )
    add("--json", "print the result as one JSON object on stdout")
    add = adder(
        parser,
        "--recipe auto: the smallest formats within a budget of quality and passes, found by "
        "measuring",
    )
    add("--budget P", "percent of the float bundle's right answers to keep", default=98.7)
    add("--max-inflation P", "percent of more passes a block to accept", default=5.0)
    add("--formats A,B", "formats to try, of int4, nvfp4, int8 and fp8", default="int4,int8")
    add_suite_options(parser)
    parser.epilog = "\n".join(
        [
            "recipes:",
            *(f"  {name:<15}{recipe['summary']}" for name, recipe in recipes.items()),
            f"  {AUTO:<15}for each layer kind, then layer by layer, what --budget allows",
            "Exit code 3: auto found nothing inside the budget.",
            "example: twotower quantize bundle --recipe int4-experts -o q4",
        ]
    )


def run(args: argparse.Namespace) -> int:
    from twotower.extras import require_libraries

    require_libraries("calibration", "onnx", "onnx_ir", "safetensors")
    from twotower.calibration.activation_statistics import read_statistics
    from twotower.calibration.quantization_plan import (
        QuantizeConfig,
        plan_quantization,
        require_float,
    )
    from twotower.calibration.quantize import quantize_bundle
    from twotower.calibration.recipes import load_recipe
    from twotower.errors import BundleError, ConfigError
    from twotower.files import require_room

    if not args.output and not args.dry_run:
        raise ConfigError(
            "there is no folder to write to",
            found="no -o",
            do="name the new bundle's folder with -o, or add --dry-run",
        )
    if args.output:
        require_room(Path(args.output), 0, error=BundleError, smaller="or use another disk")
    config = QuantizeConfig(
        rounding=args.rounding, ranges=args.ranges, calibrated_on=args.calibrated_on
    )
    bundle = checked_bundle(args.bundle)
    require_float(bundle)
    statistics = read_statistics(Path(args.stats)) if args.stats else None
    if args.recipe == AUTO:
        return _auto(args, bundle, config, statistics)
    recipe = load_recipe(args.recipe)
    if args.group is not None:
        recipe = replace(recipe, group=args.group)
    plan = plan_quantization(bundle, recipe, config, statistics)
    facts = {
        "weight_bytes": plan.nbytes,
        "recipe": recipe.to_json(),
        "name": recipe.name,
    }
    if args.dry_run:
        _report(args, bundle, facts)
        return 0
    with ProgressLine() as line:
        made = quantize_bundle(bundle, plan, Path(args.output), report=line)
    _report(args, bundle, {**facts, "precision": made.precision})
    print(
        f"next: twotower build {args.output} --target ort-cpu, then "
        f"twotower evaluate {args.output} --against {args.bundle}",
        file=sys.stderr,
    )
    return 0


def _report(args: argparse.Namespace, bundle: Bundle, facts: dict[str, Any]) -> None:
    """Prints what was made (`facts` then has its `precision`), or would be."""
    from twotower.bundle import DATA_SUFFIX, GRAPH_FILES
    from twotower.cli.expert_words import expert_words
    from twotower.units import format_bytes

    before = sum(bundle.files[graph + DATA_SUFFIX].size for graph in GRAPH_FILES.values())
    if args.json:
        print(json.dumps({"output": args.output, "weight_bytes_before": before, **facts}))
        return
    size = facts["weight_bytes"]
    print(
        f"{args.output or 'dry run'}: {facts['name']}, {format_bytes(size)} of weights, "
        f"{100 * size / before:.0f} % of the {bundle.dtype} bundle's"
    )
    # What stays as it is, parts this model does not have included, is most of the list and no news.
    for kind, how in facts.get("precision", facts["recipe"]["weights"]).items():
        if how not in (bundle.dtype, "float32"):
            print(f"  {kind:<15}{how}")
    print(f"  {'all others':<15}unchanged, {bundle.dtype}")
    for label, line in expert_words(facts["recipe"], bundle.dtype):
        print(f"  {label:<15}{line}")


def _auto(
    args: argparse.Namespace,
    bundle: Bundle,
    config: QuantizeConfig,
    statistics: Statistics | None,
) -> int:
    from twotower.extras import require_libraries

    require_libraries("calibration,cpu", "onnxruntime", what="measuring candidates (recipe auto)")
    from twotower.bundle import note_measurement
    from twotower.calibration.quantization_plan import plan_quantization
    from twotower.calibration.quantize import quantize_bundle
    from twotower.errors import BudgetError
    from twotower.evaluate.quantization.candidates import ChooseConfig
    from twotower.evaluate.quantization.choose import choose
    from twotower.evaluate.quantization.impact import ImpactConfig, note_of
    from twotower.evaluate.quantization.quantization_page import choice_lines

    wanted = ChooseConfig(
        impact=ImpactConfig(
            max_new_tokens=args.max_new_tokens,
            budget=args.budget,
            max_inflation=args.max_inflation,
        ),
        formats=tuple(word.strip() for word in args.formats.split(",") if word.strip()),
        group=args.group or 32,
        threads=args.threads,
        quantize=config,
    )
    suite, output = chosen_suite(args), Path(args.output or "auto")
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            ProgressLine("problems") as line,
            tempfile.TemporaryDirectory(prefix=f".{output.name}.auto.", dir=parent) as scratch,
        ):
            folder = Path(scratch)
            choice = choose(bundle, suite, wanted, folder, statistics=statistics, progress=line)
    except BudgetError as e:
        print(f"BudgetError: {e}", file=sys.stderr)
        return EXIT_BELOW_BUDGET
    chosen = choice.report
    plan = plan_quantization(bundle, choice.recipe, config, statistics)
    facts = {
        "weight_bytes": plan.nbytes,
        "recipe": choice.recipe.to_json(),
        "name": AUTO,
        "chosen": chosen,
    }
    if not args.dry_run:
        with ProgressLine() as line:
            made = quantize_bundle(bundle, plan, output, report=line, extra={"chosen": chosen})
        note_measurement(made, note_of(chosen, chosen["check"], "ort-cpu"))
        facts["precision"] = made.precision
    _report(args, bundle, facts)
    if not args.json:
        print("\n".join(choice_lines(chosen)))
    for flag in chosen["flags"]:
        print(f"note: on the half it was not chosen with, it {flag}", file=sys.stderr)
    return 0
