"""`twotower evaluate`: the quality diffusion keeps, and its speed, on problems with one answer."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.options import add_suite_options, adder, chosen_suite, number_list, opened_session
from twotower.cli.progress import ProgressLine
from twotower.errors import ConfigError
from twotower.files import require_place, write_output

if TYPE_CHECKING:
    from twotower.evaluate.evaluation import EvaluationConfig
    from twotower.evaluate.quantization.variants import Pair
    from twotower.evaluate.suite import Suite
    from twotower.runtime import TwoTower

EXIT_BELOW_BUDGET = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("bundle BUNDLE", "a bundle with built engines and a tokenizer")
    add(
        "--against BUNDLE2",
        "a second bundle, measured on the same problems in the same run; if one of the two is "
        "quantized, the report is about the impact of that: bytes, quality, passes a block and "
        "speed, layer kind by layer kind",
    )
    add_suite_options(parser)
    add = adder(
        parser, "what to measure beside the bundle's default preset and its own autoregression"
    )
    add("--thresholds X,Y", "commit thresholds of the sweep", default="0.5,0.7,0.8,0.9,0.95,0.98")
    add("--steps N,M", "most passes a block, each with every threshold", default="2,4,16")
    add("--no-likelihood", "do not score the right answers with the context tower")
    add = adder(parser, "of a quantized bundle --against the float one")
    add("--no-sensitivity", "do not measure one layer kind, and one tower, quantized at a time")
    add("--max-inflation P", "percent of more passes a block to accept", default=5.0)
    add(
        "--no-note",
        "do not write the result, and its flags, into the quantized bundle's bundle.json",
    )
    add = adder(parser, "what to do with the result")
    add(
        "--budget P",
        "percent of autoregression's right answers to keep, of a quantized bundle those of "
        "the float one (98.7); exit code 3 below it",
        type=float,
    )
    add(
        "--html FILE",
        "write a self-contained page, and beside it the curve as .png and the data as .json",
    )
    add("-o --output FILE", "write the data as JSON")
    add("--json", "print the data as one JSON object on stdout")
    parser.epilog = (
        "Every setting answers every problem, one at a time and in turn. Intervals are 95 %\n"
        "bootstrap intervals over the problems.\n"
        "example: twotower evaluate bundle --html report.html --budget 98.7"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.evaluate.evaluation import EvaluationConfig
    from twotower.evaluate.figures import require_charts

    config = EvaluationConfig(
        thresholds=_swept(args.thresholds, "--thresholds", float),
        steps=_swept(args.steps, "--steps", int),
        max_new_tokens=args.max_new_tokens,
        budget=args.budget,
        likelihood=not args.no_likelihood,
    )
    suite = chosen_suite(args)
    files = _outputs(args)
    if args.html:
        require_charts()
    pair = _quantized_pair(args)
    with ExitStack() as stack:
        names = [name for name in (args.bundle, args.against) if name]
        models = [stack.enter_context(opened_session(args, name)) for name in names]
        report = (
            _evaluated(args, models, suite, config)
            if pair is None
            else _impact(args, models, suite, pair)
        )
    _publish(args, report, files)
    if pair is not None and not args.no_note:
        # Last: a bundle that cannot be written must not cost the figures.
        from twotower.bundle import note_measurement
        from twotower.evaluate.quantization.impact import note_of

        target = report["quantized"]["target"]
        note_measurement(pair.quantized, note_of(report, report["compared"], target))
    if args.budget is None:
        return 0
    if pair is None:
        met = report["budget"]["met"]
    else:
        kept = report["compared"]["retention"]["value"]
        met = kept is not None and kept >= args.budget
    return 0 if met else EXIT_BELOW_BUDGET


def _swept(text: str, flag: str, number: Any) -> tuple[Any, ...]:
    """The different numbers of a list that may not be empty."""
    values = number_list(text, flag, "4,16", number)
    if not values:
        raise ConfigError(
            f"{flag} names nothing to measure",
            found=repr(text),
            do=f"write it like {flag} 4,16",
        )
    return tuple(dict.fromkeys(values))


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Files to write, by what they hold; whether they can be is found out before the work."""
    files = {"json": Path(args.output)} if args.output else {}
    if args.html:
        page = Path(args.html)
        files |= {"html": page, "png": page.with_suffix(".png")}
        files.setdefault("json", page.with_suffix(".json"))
    for file in files.values():
        require_place(file, error=ConfigError)
    return files


def _quantized_pair(args: argparse.Namespace) -> Pair | None:
    """The two bundles if the report is about quantization."""
    from twotower.bundle import Bundle
    from twotower.extras import require_libraries

    if not args.against:
        return None
    first, second = (Bundle.open(name, contents=False) for name in (args.bundle, args.against))
    if first.quantization is None and second.quantization is None:
        return None
    require_libraries(
        "calibration",
        "onnx",
        "onnx_ir",
        "safetensors",
        what="measuring the impact of quantization",
    )
    from twotower.evaluate.quantization.variants import require_pair

    return require_pair(first, second)


def _evaluated(
    args: argparse.Namespace, models: list[TwoTower], suite: Suite, config: EvaluationConfig
) -> dict[str, Any]:
    from twotower.evaluate.evaluation import evaluate

    other = models[1] if args.against else None
    with ProgressLine("problems") as line:
        report = evaluate(models[0], suite, config, other=other, progress=line)
    names = (args.bundle, args.against)
    for key, name, model in zip(("bundle", "other"), names, models):  # noqa: B905
        report[key] = {"name": Path(name).resolve().name, "target": model.target}
    return report


def _impact(
    args: argparse.Namespace, models: list[TwoTower], suite: Suite, pair: Pair
) -> dict[str, Any]:
    from twotower.evaluate.quantization.impact import ImpactConfig
    from twotower.evaluate.quantization.variants import impact_of

    config = ImpactConfig(
        max_new_tokens=args.max_new_tokens,
        budget=98.7 if args.budget is None else args.budget,
        max_inflation=args.max_inflation,
    )
    first, second = models
    with ProgressLine("problems") as line:
        return impact_of(
            pair,
            (first, second) if pair.quantized.path == Path(args.bundle) else (second, first),
            suite,
            config,
            sensitivity=not args.no_sensitivity,
            threads=args.threads,
            progress=lambda done, total: line("answering", done, total),
        )


def _publish(args: argparse.Namespace, report: dict[str, Any], files: dict[str, Path]) -> None:
    """Prints the report, which a full disk must not cost, and writes the files."""
    from twotower.bundle import Bundle
    from twotower.evaluate.evaluation_page import report_lines, report_page
    from twotower.evaluate.figures import draw_curve, draw_sensitivity
    from twotower.evaluate.quantization.quantization_page import impact_lines, impact_page

    contents: dict[str, bytes] = {}
    impact = "compared" in report
    if "html" in files:
        model = Bundle.open(args.bundle, contents=False).source["name"]
        svg, contents["png"] = draw_sensitivity(report) if impact else draw_curve(report)
        page = (impact_page if impact else report_page)(report, svg, model=model)
        contents["html"] = page.encode()
    if "json" in files:
        contents["json"] = (json.dumps(report, indent=1) + "\n").encode()
    if args.json:
        print(json.dumps(report))
    else:
        print("\n".join((impact_lines if impact else report_lines)(report)), flush=True)
    for kind, data in contents.items():
        write_output(files[kind], data, error=ConfigError)
    for file in files.values():
        print(f"wrote {file}", file=sys.stderr)
