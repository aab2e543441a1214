"""What mode `auto` costs: its passes beside those of the better mode, in turns; `make bench-auto`.

Two models, both on ONNX Runtime on this CPU: the small trained one on prompts of the suite, where
diffusion wins, and the one of `make mid` with random weights, whose blocks take as many passes as
they may, where autoregression wins unless `--steps` is small. What is compared is the summed time
of passes: those of a block that `auto` denoised and dropped included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from twotower.bench.speed import random_prompts
from twotower.config import GenerationConfig
from twotower.evaluate.suite import load_suite
from twotower.runtime import TwoTower

SUITE_PROMPTS = 32
MODES = ("diffusion", "ar", "auto")
Prompts = Sequence[str] | Sequence[list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--tiny",
        type=Path,
        metavar="BUNDLE",
        help="the small trained model, built and tuned or not",
    )
    parser.add_argument("--mid", type=Path, metavar="BUNDLE", help="a model with random weights")
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="measured runs of each mode (3)"
    )
    args = parser.parse_args(arguments)
    print(f"{'':<34}" + "".join(f"{mode:>12}" for mode in MODES) + f"{'auto / best':>14}")
    if args.tiny:
        with TwoTower.open(args.tiny, target="ort-cpu") as model:
            problems = load_suite().problems
            prompts = [problem.prompt for problem in problems[:: len(problems) // SUITE_PROMPTS]][
                :SUITE_PROMPTS
            ]
            base = replace(model.defaults, max_new_tokens=48)
            for rows in (1, 8):
                line(
                    f"suite, {rows} row(s)",
                    model,
                    [prompts[i : i + rows] for i in range(0, len(prompts), rows)],
                    base,
                    args.runs,
                )
    if args.mid:
        with TwoTower.open(args.mid, target="ort-cpu", max_batch=8) as model:
            for steps in (16, 4, 2):
                base = replace(
                    GenerationConfig(),
                    max_new_tokens=64,
                    confidence_threshold=1.0,
                    steps_per_block=steps,
                    ignore_eos=True,
                )
                for rows in (1, 8):
                    batches = [random_prompts(model.config, 64, rows, seed=0)]
                    line(
                        f"random weights, {steps} passes, {rows} row(s)",
                        model,
                        batches,
                        base,
                        args.runs,
                    )
    return 0


def line(
    what: str, model: TwoTower, batches: Sequence[Prompts], base: GenerationConfig, runs: int
) -> None:
    """One row of the table, in seconds."""
    spent: dict[str, list[float]] = {mode: [] for mode in MODES}
    for run in range(runs + 1):
        for mode in MODES:
            seconds = sum(passes(model, batch, replace(base, mode=mode)) for batch in batches)
            if run:
                spent[mode].append(seconds)
    medians = {mode: median(values) for mode, values in spent.items()}
    best = min(medians["diffusion"], medians["ar"])
    print(
        f"{what:<34}"
        + "".join(f"{medians[mode]:>12.3f}" for mode in MODES)
        + f"{medians['auto'] / best:>14.3f}",
        flush=True,
    )


def passes(model: TwoTower, prompts: Prompts, config: GenerationConfig) -> float:
    """Seconds of all passes of a batch but for the reading of its prompts."""
    started = time.perf_counter()
    results = model.generate(list(prompts), config)
    return time.perf_counter() - started - max(r.timings.prefill for r in results) / 1000


if __name__ == "__main__":
    sys.exit(main())
