"""The trained model from checkpoint to text, in both modes (`make demo`)."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from twotower import TwoTower
from twotower.cli.main import main as twotower
from twotower.runtime import Generation

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = Path("assets/twotower-tiny")
BUNDLE = Path("out/demo")
QUESTIONS = (
    "json: Mia is 41 years old, lives in Oslo and likes tea. Leo is 27 years old, lives in Lima and likes milk.",
    "sums: a 12+35 b 48+21 c 17+17 d 30+49 e 26+16 f 41+12 g 33+44 h 15+28 i 40+39",
    "write from Ann to Omar: green kite, Kyoto, Friday, owl",
    "flip: a cat b red c lamp d owl e blue f kite g fox h bell i green j boat",
)


def main() -> int:
    shutil.rmtree(ROOT / BUNDLE, ignore_errors=True)
    for command in (
        ["export", str(CHECKPOINT), "-o", str(BUNDLE)],
        ["build", str(BUNDLE), "--target", "ort-cpu"],
    ):
        print(f"\n$ twotower {' '.join(command)}", flush=True)
        code = twotower(command)
        if code != 0:
            return code
    spent = {"ar": [0, 0.0, 0], "diffusion": [0, 0.0, 0]}
    with TwoTower.open(BUNDLE, target="ort-cpu") as model:
        for question in QUESTIONS:
            prompt = f"Q: {question}\nA:"
            print(f"\nQ: {question}")
            for mode, sums in spent.items():
                config = replace(model.defaults, mode=mode, max_new_tokens=160)
                model.generate(
                    prompt, config
                )  # binds the buffers, so that the run shown is not the first
                result = model.generate(prompt, config)
                print(f"  {mode:<9} {(result.text or '').strip()}\n            {_cost(result)}")
                sums[0] += result.usage.completion_tokens
                sums[1] += result.timings.total
                sums[2] += result.usage.nfe
        threshold = model.defaults.confidence_threshold
    print(f"\n{'':<12}{'tokens/s':>10}{'tokens a pass':>16}")
    for mode, (tokens, ms, passes) in spent.items():
        print(f"{mode:<12}{1000 * tokens / ms:>10.0f}{tokens / passes:>16.2f}")
    ratio = spent["diffusion"][0] / spent["diffusion"][1] / (spent["ar"][0] / spent["ar"][1])
    print(
        f"diffusion at threshold {threshold:g} is {ratio:.2f}x autoregression here, on a model of 1.3 million parameters a tower"
    )
    print(f"Go on by hand:  .venv/bin/twotower evaluate {BUNDLE} --limit 10 --html out/report.html")
    return 0


def _cost(result: Generation) -> str:
    usage, ms = result.usage, result.timings.total
    passes = (
        f"{usage.nfe} passes in {usage.blocks} blocks" if usage.blocks else f"{usage.nfe} passes"
    )
    return f"{usage.completion_tokens} tokens, {passes}, {ms:.1f} ms, {1000 * usage.completion_tokens / ms:.0f} tokens/s"


if __name__ == "__main__":
    sys.exit(main())
