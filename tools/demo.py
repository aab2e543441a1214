"""The whole way on a toy model: checkpoint -> ONNX graphs -> engines -> text, in both modes; `make demo` runs this.

The checkpoint has random weights and no tokenizer: what comes out are token ids without meaning, computed by the code that ships.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from twotower import GenerationConfig, TwoTower
from twotower.cli.main import main as twotower

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = Path("tests/fixtures/hybrid-a")
BUNDLE = Path("out/demo")
PROMPT = (5, 17, 42, 99, 128, 200, 7, 61)
NEW_TOKENS = 64


def main() -> int:
    shutil.rmtree(ROOT / BUNDLE, ignore_errors=True)
    for command in (["export", str(CHECKPOINT), "-o", str(BUNDLE)], ["build", str(BUNDLE), "--target", "ort-cpu"]):
        print(f"\n$ twotower {' '.join(command)}", flush=True)
        code = twotower(command)
        if code != 0:
            return code
    with TwoTower.open(BUNDLE, target="ort-cpu") as model:
        for mode in ("diffusion", "ar"):
            _show(model, GenerationConfig(mode=mode, max_new_tokens=NEW_TOKENS, confidence_threshold=0.8, ignore_eos=True))
    print("\nA toy with random weights: its speed and its tokens a pass say nothing about the real model.")
    print(f'Go on by hand: .venv/bin/twotower generate {BUNDLE} --tokens "5 17 42" --stream')
    return 0


def _show(model: TwoTower, config: GenerationConfig) -> None:
    model.generate(PROMPT, config)  # binds the buffers, so that the run shown is not the first
    result = model.generate(PROMPT, config)
    usage, seconds = result.usage, result.timings.total / 1000
    print(f"\n{config.mode}: {usage.completion_tokens} new tokens after a prompt of {usage.prompt_tokens} ({result.finish_reason})")
    for first in range(0, len(result.tokens), config.block_size):
        print("  " + " ".join(f"{t:3d}" for t in result.tokens[first : first + config.block_size]))
    if config.mode == "diffusion":
        print(f"  passes per block  {usage.steps_per_block:.2f}  ({usage.nfe} denoiser passes in {usage.blocks} blocks)")
    else:
        print(f"  passes per token  {usage.nfe / usage.completion_tokens:.2f}  ({usage.nfe} passes of the context tower)")
    print(f"  tokens per second {usage.completion_tokens / seconds:.0f}  ({1000 * seconds:.1f} ms)")


if __name__ == "__main__":
    sys.exit(main())
