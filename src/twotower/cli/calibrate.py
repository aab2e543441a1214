"""`twotower calibrate`: activation ranges of every matrix product, from real denoising."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from twotower.cli.options import add_generation_options, adder, checked_bundle, generation_overrides
from twotower.cli.progress import ProgressLine
from twotower.config import GenerationConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("bundle BUNDLE", "a float bundle; its ort-cpu engine is built if it is not there")
    add(
        "--prompts F.jsonl",
        'one {"text": ...} or {"tokens": [...]} a line, like --prompt-file of generate',
        required=True,
    )
    add("-o --output STATS", "the folder to make", required=True)
    add("--limit N", "only the first N prompts", type=int)
    add("--no-plot", "do not draw ranges against the masked fraction (needs no matplotlib)")
    add("--json", "print what was gathered as one JSON object on stdout")
    add_generation_options(parser)
    parser.epilog = (
        "Generates from every prompt with the runtime's own loop, one after the other, and\n"
        "records range and histogram of the input of every matrix product: in the context tower\n"
        "on text, in the denoiser by masked fraction of the block, finished blocks apart. An\n"
        "interrupted run resumes when the same command is given again. Only int8 and fp8 recipes\n"
        "need statistics.\n"
        "example: twotower calibrate bundle --prompts prompts.jsonl -o stats"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.extras import require_libraries

    require_libraries("calibration", "onnx", "onnx_ir", "safetensors")
    require_libraries("calibration,cpu", "onnxruntime", what="generating from the prompts")
    from twotower.calibration.collect import collect
    from twotower.cli.prompts import read_prompts
    from twotower.errors import ConfigError
    from twotower.evaluate.figures import draw_ranges
    from twotower.runtime import Request

    if args.limit is not None and args.limit < 1:
        raise ConfigError(
            f"--limit cannot be {args.limit}",
            found="allowed: 1 and more",
            do="pass a positive --limit",
        )
    if not args.no_plot:
        what = "drawing the ranges (--no-plot leaves that out)"
        require_libraries("calibration", "matplotlib", what=what)
    bundle = checked_bundle(args.bundle)
    base = GenerationConfig.from_mapping(generation_overrides(args), base=bundle.defaults)
    prompts = read_prompts(Path(args.prompts), base)[: args.limit]
    requests = [Request(prompt, config) for prompt, config in prompts]
    with ProgressLine("prompts") as line:
        statistics = collect(
            bundle,
            requests,
            Path(args.output),
            base,
            draw=None if args.no_plot else draw_ranges,
            report=line,
        )
    facts = statistics.facts
    inputs = {tower: len(s.names) for tower, s in statistics.towers.items()}
    if args.json:
        head = {"output": args.output, "sha256": statistics.sha256, "inputs": inputs}
        print(json.dumps({**head, **facts}))
        return 0
    print(
        f"{args.output}: {facts['prompts']} prompts, {facts['tokens']} tokens, "
        f"{facts['blocks']} blocks in {facts['passes']} passes"
    )
    print(
        f"inputs of matrix products observed: {inputs['context']} in the context tower, "
        f"{inputs['denoiser']} in the denoiser"
    )
    print(
        f"next: twotower quantize {args.bundle} --recipe int8 --stats {args.output} -o quantized",
        file=sys.stderr,
    )
    return 0
