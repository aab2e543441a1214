"""The tables of docs/measurements/quantization.md.

Every recipe on the small model, what calibration changes, and what TensorRT for RTX builds.

    python tools/quantization_tables.py                 writes them into the document
    python tools/quantization_tables.py --only builds   one of them

Each stands between two comments that name it. Nothing is entered by hand.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.base import CHOSEN, STANDARD
from twotower.builders.trt.engine_inspector import expands_experts
from twotower.bundle import Bundle
from twotower.calibration import QuantizeConfig, builtin_recipes, plan_quantization, quantize_bundle
from twotower.calibration.activation_statistics import Statistics
from twotower.calibration.collect import collect
from twotower.cli.prompts import read_prompts
from twotower.errors import BuildAbortedError, BuildError
from twotower.evaluate.figures import draw_ranges
from twotower.evaluate.measure import Run, measure
from twotower.evaluate.quantization.impact import compared
from twotower.evaluate.quantization.variants import Variants, bytes_by_kind, parts_alone
from twotower.evaluate.resampling import interval_text
from twotower.evaluate.suite import load_suite
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.runtime import Request, TwoTower

ROOT = Path(__file__).parents[1]
TINY, PROMPTS = ROOT / "assets" / "twotower-tiny", ROOT / "assets" / "twotower-tiny-prompts.jsonl"
SMS = (86, 89, 120)
NEEDS_STATISTICS = [r.name for r in builtin_recipes().values() if r.activations]


class Bench:
    """The small model in both widths, its statistics, and quantized bundles of it, made when they are asked for."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        checkpoint = Checkpoint.open(TINY)
        self.full, self.half = (
            export_bundle(checkpoint, scratch / dtype, ExportConfig(dtype=dtype))
            for dtype in ("float32", "bfloat16")
        )
        base = replace(self.full.defaults, max_new_tokens=160)
        requests = [Request(prompt, config) for prompt, config in read_prompts(PROMPTS, base)]
        self.statistics: Statistics = collect(self.full, requests, scratch / "statistics", base)

    def quantized(
        self, recipe: str, bundle: Bundle | None = None, *, engine: bool = True, **options: Any
    ) -> Bundle:
        source = bundle or self.full
        path = self._scratch / "-".join([source.dtype, recipe, *map(str, options.values())])
        if not path.exists():
            plan = plan_quantization(
                source, builtin_recipes()[recipe], QuantizeConfig(**options), self.statistics
            )
            quantize_bundle(source, plan, path)
        made = Bundle.open(path)
        if engine:
            build_engines(made, "ort-cpu", builder_for("ort-cpu"))
        return made

    def in_form(self, recipe: str, dialect: str) -> Bundle:
        """The float32 model with an engine that rounds the inputs of products (`chosen`) or does not (`standard`)."""
        made = Bundle.open(
            shutil.copytree(self.quantized(recipe).path, self._scratch / f"{recipe}-{dialect}")
        )
        build_engines(made, "ort-cpu", builder_for("ort-cpu"), config=BuildConfig(dialect=dialect))
        return made

    def compared(self, bundles: dict[str, Bundle]) -> dict[str, Any]:
        """Every bundle against the float one, all on the same problems in one run."""
        return self.held_against(
            {name: TwoTower.open(bundle.path, "ort-cpu") for name, bundle in bundles.items()}
        )

    def parts(self, recipe: str) -> dict[str, Any]:
        """One layer kind, and one tower, of a recipe at a time."""
        made = self.quantized(recipe)
        scratch = self._scratch / f"parts-{recipe}"
        scratch.mkdir()
        variants = Variants(self.full, [made], scratch)
        return self.held_against(
            {name: variants.open(precision) for name, precision in parts_alone(made)}
        )

    def held_against(self, models: dict[str, TwoTower]) -> dict[str, Any]:
        suite = load_suite()
        with TwoTower.open(self.full.path, "ort-cpu") as exact:
            config = replace(exact.defaults, max_new_tokens=160)
            runs = [
                Run("", exact, config),
                *(Run(name, model, config) for name, model in models.items()),
            ]
            measured = measure(suite.problems, runs, _tell)
            for model in models.values():
                model.close()
        return {name: compared(measured[name], measured[""]) for name in models}


def _tell(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"  {done} of {total} problems", flush=True)


def recipes(bench: Bench) -> list[str]:
    """Quality, passes and bytes of every recipe."""
    rows = [
        "| recipe | kept, 95 % interval | more passes a block, % | same text | bundle, of BF16 | experts, of BF16 |",
        "|---|---|---|---|---|---|",
    ]
    figures = bench.compared({name: bench.quantized(name) for name in builtin_recipes()})
    experts = bytes_by_kind(bench.half)["routed_expert"]
    for name, facts in figures.items():
        half = bench.quantized(name, bench.half, engine=False)
        cells = (
            f"`{name}`",
            f"{interval_text(facts['retention'])} %",
            _more(facts),
            f"{facts['same_text']} of {facts['problems']}",
            f"{_size(half) / _size(bench.half):.3f}x",
            f"{bytes_by_kind(half)['routed_expert'] / experts:.3f}x",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def inputs(bench: Bench) -> list[str]:
    """What the products of a CPU, which round their inputs to 8 bits block by block, add to recipes."""
    cases = {}
    for recipe in (
        "int8-weights",
        "int4-experts",
        "mixed",
    ):  # of 96 weights a row there are groups of 32 only
        for dialect, how in ((CHOSEN, "8 bits"), (STANDARD, "as they are")):
            cases[f"`{recipe}` | {how}"] = bench.in_form(recipe, dialect)
    rows = [
        "| recipe | inputs of products | kept, 95 % interval | more passes a block, % | same text |",
        "|---|---|---|---|---|",
    ]
    for label, facts in bench.compared(cases).items():
        rows.append(
            f"| {label} | {interval_text(facts['retention'])} % | {_more(facts)} | {facts['same_text']} of {facts['problems']} |"
        )
    return rows


def calibration(bench: Bench) -> list[str]:
    """What inputs calibrated otherwise, and weights rounded otherwise, come to."""
    cases: dict[str, Bundle] = {}
    for recipe in NEEDS_STATISTICS:
        for source in ("trajectories", "text"):
            for ranges in ("max", "percentile", "mse") if recipe == "int8" else ("max",):
                label = f"`{recipe}` | {source} | {ranges} | mse"
                cases[label] = bench.quantized(
                    recipe, rounding="mse", ranges=ranges, calibrated_on=source
                )
    for recipe in ("int8-weights", "int4-experts", "nvfp4-experts"):
        for rounding in ("plain", "mse"):
            cases[f"`{recipe}` | - | - | {rounding}"] = bench.quantized(recipe, rounding=rounding)
    rows = ["| recipe | inputs calibrated on | ranges | rounding of weights | kept, 95 % interval | more passes a block, % | same text |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for label, facts in bench.compared(cases).items():
        rows.append(
            f"| {label} | {interval_text(facts['retention'])} % | {_more(facts)} | {facts['same_text']} of {facts['problems']} |"
        )
    return [*rows, "", *_outside(bench)]


def _outside(bench: Bench) -> list[str]:
    """By how much real steps leave the range that finished text shows."""
    seen = bench.statistics.towers["denoiser"]
    text, steps = seen.amax[:, 0], seen.amax[:, 1:]
    most = np.nanmax(steps, axis=1) / text
    order = most.argsort()[::-1][:4]
    named = ", ".join(
        f"`{seen.names[i].removeprefix('denoiser_tower.')}` {most[i]:.2f}x" for i in order
    )
    beyond = f"{int((most > 1).sum())} of {len(most)} inputs reach beyond what finished blocks show, furthest"
    return [f"In the denoiser {beyond}: {named}."]


def sensitivity(bench: Bench) -> list[str]:
    """What each part of the recipes that round everything costs alone."""
    rows = [
        "| recipe | quantized alone | kept, 95 % interval | more passes a block, % | same text |",
        "|---|---|---|---|---|",
    ]
    for recipe in NEEDS_STATISTICS:
        for part, facts in bench.parts(recipe).items():
            cells = (
                f"`{recipe}`",
                part,
                f"{interval_text(facts['retention'])} %",
                _more(facts),
                f"{facts['same_text']} of {facts['problems']}",
            )
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def builds(bench: Bench) -> list[str]:
    """Every recipe for every compute capability, in bfloat16, by TensorRT for RTX, which multiplies the experts too.

    Raises:
        BuildAbortedError: a build ended before the library's verdict; there is no table then.
    """
    rows = [
        "| recipe | " + " | ".join(f"SM {sm}" for sm in SMS) + " |",
        "|---|" + "---|" * len(SMS),
    ]
    for name in builtin_recipes():
        bundle, cells = bench.quantized(name, bench.half, engine=False), []
        for sm in SMS:
            try:
                config = BuildConfig(
                    sms=(sm,), max_context=256, experts="dense", force=True, allow_expanded=True
                )
                record = build_engines(bundle, "rtx", builder_for("rtx"), config=config)
                lines = [
                    line for engine in record.report["engines"].values() for line in engine["log"]
                ]
                unexplained = sum(not line["explained"] for line in lines)
                how = "built" if not expands_experts(record) else "with `--allow-expanded`"
                cells.append(how + (f", {unexplained} unexplained warnings" if unexplained else ""))
            except BuildAbortedError:
                raise  # a process that was killed, or a full disk: that says nothing of the format
            except BuildError as e:
                cells.append(f"refused: {e.what.split(' of ')[0]} ({e.found})")
            print(f"  {name} SM {sm}: {cells[-1]}", flush=True)
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return rows


def _more(facts: dict[str, Any]) -> str:
    return interval_text(
        {k: None if v is None else 100 * (v - 1) for k, v in facts["inflation"].items()}
    )


def _size(bundle: Bundle) -> int:
    return sum(record.size for record in bundle.files.values())


TABLES: dict[str, Callable[[Bench], list[str]]] = {
    "recipes": recipes,
    "inputs": inputs,
    "sensitivity": sensitivity,
    "calibration": calibration,
    "builds": builds,
}


def replaced(text: str, name: str, rows: list[str], *, tool: str = "quantization_tables.py") -> str:
    """The document with one table exchanged."""
    start, end = f"<!-- {name}: made by tools/{tool} -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n" + "\n".join(rows) + f"\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs" / "measurements" / "quantization.md",
        help="the document (%(default)s)",
    )
    parser.add_argument("--only", choices=TABLES, help="one table")
    parser.add_argument(
        "--picture",
        type=Path,
        default=ROOT / "docs" / "images" / "ranges.png",
        help="ranges against t (%(default)s)",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantization-tables-") as scratch:
        bench = Bench(Path(scratch))
        args.picture.write_bytes(draw_ranges(bench.statistics)["ranges.png"])
        for name in [args.only] if args.only else TABLES:
            print(name, flush=True)
            rows = TABLES[name](bench)
            args.output.write_text(
                replaced(args.output.read_text(encoding="utf-8"), name, rows), encoding="utf-8"
            )


if __name__ == "__main__":
    main()
