"""`twotower evaluate`: how much quality diffusion keeps, and how much faster it is, on problems with one right answer."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twotower.cli.options import add_device_options, device_options
from twotower.errors import ConfigError
from twotower.files import write_atomically

__all__ = ["add_arguments", "add_suite_arguments", "chosen_suite", "numbers", "run"]

EXIT_BELOW_BUDGET = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle with built engines and a tokenizer"
    )
    parser.add_argument(
        "--against",
        metavar="BUNDLE2",
        help="a second bundle, measured on the same problems in the same run; where one of the two is quantized the report is about what "
        "that costs: bytes, quality, passes a block, speed, layer kind by layer kind",
    )
    add_suite_arguments(parser)
    sweep = parser.add_argument_group(
        "what to measure beside the bundle's default preset and its own autoregression"
    )
    sweep.add_argument(
        "--thresholds",
        default="0.5,0.7,0.8,0.9,0.95,0.98",
        metavar="X,Y",
        help="commit thresholds of the sweep (%(default)s)",
    )
    sweep.add_argument(
        "--steps",
        default="2,4,16",
        metavar="N,M",
        help="most passes a block, each with every threshold (%(default)s)",
    )
    sweep.add_argument(
        "--no-likelihood",
        dest="likelihood",
        action="store_false",
        help="do not score the right answers with the context tower",
    )
    price = parser.add_argument_group("of a quantized bundle --against the float one")
    price.add_argument(
        "--no-sensitivity",
        action="store_true",
        help="do not measure one layer kind, and one tower, quantized at a time",
    )
    price.add_argument(
        "--max-inflation",
        type=float,
        default=5.0,
        metavar="P",
        help="percent of more passes a block to accept (%(default)s)",
    )
    price.add_argument(
        "--no-note",
        action="store_true",
        help="do not note the result, and its flags, in the quantized bundle's bundle.json",
    )
    out = parser.add_argument_group("what to do with the result")
    out.add_argument(
        "--budget",
        type=float,
        metavar="P",
        help="percent of autoregression's right answers to keep, of a quantized bundle those of the float one (98.7); exit code 3 below it",
    )
    out.add_argument(
        "--html",
        metavar="FILE",
        help="write a self-contained page, and beside it the curve as .png and the data as .json",
    )
    out.add_argument("-o", "--output", metavar="FILE", help="write the data as JSON")
    out.add_argument(
        "--json", action="store_true", help="print the data as one JSON object on stdout"
    )
    parser.epilog = (
        "Every setting answers every problem, one at a time and in turn. Intervals are 95 % bootstrap intervals over the problems.\n"
        "example: twotower evaluate bundle --html report.html --budget 98.7"
    )


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `evaluate` and `tune` share."""
    group = parser.add_argument_group("which problems")
    group.add_argument(
        "--suite",
        metavar="F.jsonl",
        help='a problem a line: {"kind": ..., "prompt": ..., "answer": ...} (default: the one that comes along)',
    )
    group.add_argument("--kinds", metavar="A,B", help="only these kinds")
    group.add_argument("--limit", type=int, metavar="N", help="only N problems of each kind")
    group.add_argument(
        "--max-new-tokens", type=int, default=160, metavar="N", help="longest answer (%(default)s)"
    )
    group.add_argument(
        "--target", metavar="T", help="engine to run (default: the best that is built and fits)"
    )
    group.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of a CPU engine (0: one a usable core, one for a small model)",
    )
    add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    from twotower.cli.progress import ProgressLine, opening
    from twotower.evaluate.evaluation import EvaluationConfig, evaluate
    from twotower.evaluate.figures import require_charts
    from twotower.runtime import TwoTower

    config = EvaluationConfig(
        thresholds=numbers(args.thresholds, "--thresholds"),
        steps=tuple(int(n) for n in numbers(args.steps, "--steps")),
        max_new_tokens=args.max_new_tokens,
        budget=args.budget,
        likelihood=args.likelihood,
    )
    suite = chosen_suite(args)
    files = _outputs(args)
    if args.html:
        require_charts()
    line, checking, pair = ProgressLine("problems"), ProgressLine(), _pair(args)
    options = {
        "target": args.target,
        "threads": args.threads,
        **device_options(args),
        **opening(checking),
    }
    with ExitStack() as stack:
        opened = [
            stack.enter_context(TwoTower.open(b, **options))
            for b in (args.bundle, args.against)
            if b
        ]
        checking.end()
        if pair is not None:
            return _price(args, pair, opened, suite=suite, files=files)
        result = evaluate(
            opened[0], suite, config, other=opened[1] if args.against else None, progress=line
        )
        result.report["bundle"] = {
            "name": Path(args.bundle).resolve().name,
            "target": opened[0].target,
        }
        if args.against:
            result.report["other"] = {
                "name": Path(args.against).resolve().name,
                "target": opened[1].target,
            }
    line.end()
    _write(result.report, files)
    print(json.dumps(result.report) if args.json else "\n".join(_lines(result.report)))
    for file in files.values():
        print(f"wrote {file}", file=sys.stderr)
    return (
        EXIT_BELOW_BUDGET if args.budget is not None and not result.report["budget"]["met"] else 0
    )


def _pair(args: argparse.Namespace) -> Any:
    """The two bundles if the report is about quantization."""
    from twotower.bundle import Bundle

    if not args.against:
        return None
    first, second = (Bundle.open(b, contents=False) for b in (args.bundle, args.against))
    if first.quantization is None and second.quantization is None:
        return None
    from twotower.extras import require_libraries

    require_libraries(
        "calibration", "onnx", "onnx_ir", "safetensors", what="measuring what quantization costs"
    )
    from twotower.evaluate.quantization.variants import require_pair

    return require_pair(first, second)


def _price(
    args: argparse.Namespace, pair: Any, opened: list[Any], *, suite: Any, files: dict[str, Path]
) -> int:
    from twotower.bundle import note_measurement
    from twotower.cli.progress import ProgressLine
    from twotower.evaluate.quantization.price import PriceConfig
    from twotower.evaluate.quantization.quantization_page import price_lines
    from twotower.evaluate.quantization.variants import note_of, price_of

    config = PriceConfig(
        max_new_tokens=args.max_new_tokens,
        budget=98.7 if args.budget is None else args.budget,
        max_inflation=args.max_inflation,
    )
    line = ProgressLine("problems")
    models = (
        (opened[0], opened[1])
        if pair.quantized.path == Path(args.bundle)
        else (opened[1], opened[0])
    )
    report = price_of(
        pair,
        models,
        suite,
        config,
        sensitivity=not args.no_sensitivity,
        threads=args.threads,
        progress=lambda done, total: line("answering", done, total),
    )
    line.end()
    _write(report, files)
    print(json.dumps(report) if args.json else "\n".join(price_lines(report)))
    for file in files.values():
        print(f"wrote {file}", file=sys.stderr)
    if not args.no_note:  # last: a bundle that cannot be written must not cost the figures
        note_measurement(pair.quantized, note_of(report))
    kept = report["compared"]["retention"]["value"]
    return (
        EXIT_BELOW_BUDGET if args.budget is not None and (kept is None or kept < args.budget) else 0
    )


def numbers(text: str, option: str) -> tuple[float, ...]:
    """The numbers of a comma-separated option.

    Raises:
        ConfigError: something else is among them, or nothing.
    """
    try:
        out = tuple(dict.fromkeys(float(word) for word in text.split(",") if word.strip()))
    except ValueError as e:
        raise ConfigError(
            f"{option} {text!r} is not a list of numbers",
            found=str(e),
            do=f"write it like {option} 4,16",
        ) from e
    if not out:
        raise ConfigError(
            f"{option} names nothing to measure",
            found=repr(text),
            do=f"write it like {option} 4,16",
        )
    return out


def chosen_suite(args: argparse.Namespace) -> Any:
    """The suite of the command line, narrowed to the kinds and the number asked for."""
    from twotower.evaluate.suite import load_suite

    suite = load_suite(Path(args.suite) if args.suite else None)
    return suite.only(
        kinds=tuple(k.strip() for k in (args.kinds or "").split(",") if k.strip()), limit=args.limit
    )


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Files to write, by what they hold; whether they can be is found out before the work."""
    out = {"json": Path(args.output)} if args.output else {}
    if args.html:
        page = Path(args.html)
        out |= {"html": page, "png": page.with_suffix(".png")}
        out.setdefault("json", page.with_suffix(".json"))
    for file in out.values():
        if not file.absolute().parent.is_dir() or file.is_dir():
            raise ConfigError(
                f"cannot write {file}",
                found="no such folder, or a folder of that name",
                do="name a file in a folder that exists",
            )
    return out


def _write(report: dict[str, Any], files: dict[str, Path]) -> None:
    contents: dict[str, bytes] = {}
    if "html" in files and "compared" in report:
        from twotower.evaluate.figures import draw_sensitivity
        from twotower.evaluate.quantization.quantization_page import price_page

        svg, contents["png"] = draw_sensitivity(report)
        contents["html"] = price_page(report, svg).encode()
    elif "html" in files:
        from twotower.evaluate.evaluation_page import report_page
        from twotower.evaluate.figures import draw_curve

        svg, contents["png"] = draw_curve(report)
        contents["html"] = report_page(report, svg).encode()
    if "json" in files:
        contents["json"] = (json.dumps(report, indent=1) + "\n").encode()
    for kind, data in contents.items():
        write_atomically(files[kind], data)


def _lines(report: dict[str, Any]) -> list[str]:
    from twotower.evaluate.evaluation import AR, DEFAULT, OTHER, interval_text
    from twotower.evaluate.evaluation_page import where_it_loses

    settings, suite = report["settings"], report["suite"]
    ar, diffusion = settings[AR]["total"], settings[DEFAULT]["total"]
    head = f"{'':<12}{'right':>8}{'kept':>9}{'speed':>8}{'tokens/s':>10}{'passes/block':>14}{'tokens/pass':>13}"
    lines = [
        f"{suite['problems']} problems of {len(suite['kinds'])} kinds ({suite['name']} {suite['sha256'][:12]})",
        "",
        head,
    ]
    for name, setting in settings.items():
        lines.append(
            _row({AR: "ar", DEFAULT: "diffusion", OTHER: "other"}.get(name, name), setting["total"])
        )
    lines += ["", f"{'task':<12}{'ar':>8}{'right':>8}{'kept':>9}{'speed':>8}{'passes/block':>14}"]
    for kind, facts in settings[DEFAULT]["kinds"].items():
        before, passes = (
            settings[AR]["kinds"][kind]["exact"]["value"],
            facts["passes_per_block"] or 0.0,
        )
        figures = f"{before:>7.1f}%{facts['exact']['value']:>7.1f}%{_cell(facts['retention']['value'], 8, 1)}%"
        lines.append(f"{kind:<12}{figures}{_cell(facts['speedup']['value'], 7, 2)}x{passes:>14.2f}")
    loses = "; ".join(where_it_loses(report)) or "nowhere"
    lines += [
        "",
        f"diffusion keeps {interval_text(diffusion['retention'])} % of autoregression's {ar['right']} right answers, "
        f"at {interval_text(diffusion['speedup'], 2)} times its speed",
        f"where it loses: {loses}",
    ]
    if "budget" in report:
        verdict = "kept" if report["budget"]["met"] else "NOT kept"
        lines.append(f"budget of {report['budget']['percent']:g} %: {verdict}")
    return lines


def _row(name: str, total: dict[str, Any]) -> str:
    kept = f"{_cell(total['retention']['value'], 8, 1)}%{_cell(total['speedup']['value'], 7, 2)}x"
    rates = f"{_cell(total['tokens_per_second'], 10, 0)}{_cell(total['passes_per_block'], 14, 2)}{_cell(total['tokens_per_pass'], 13, 2)}"
    return f"{name:<12}{total['exact']['value']:>7.1f}%{kept}{rates}"


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
