"""`twotower generate`: text or tokens from a bundle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.cli.options import (
    add_generation_options,
    add_session_options,
    adder,
    generation_overrides,
    number_list,
    opened_session,
)
from twotower.cli.progress import ProgressLine
from twotower.cli.prompts import read_prompts
from twotower.config import GenerationConfig

if TYPE_CHECKING:
    from twotower.runtime import Generation, Request, TwoTower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("bundle BUNDLE", "a bundle with built engines")
    prompt = adder(parser.add_mutually_exclusive_group(required=True))
    prompt("prompt PROMPT", "text to continue (needs a bundle with a tokenizer)", nargs="?")
    prompt('--tokens "5 6 7"', "token ids to continue, separated by spaces or commas")
    prompt(
        "--prompt-file F.jsonl",
        'one {"text": ...} or {"tokens": [...]} a line, if wanted with options of its own',
    )
    add_generation_options(parser)
    add_session_options(parser)
    add("--max-batch N", "prompts generated together at most", default=8)
    add("--stream", "print each block as it is committed")
    add("--json", "print one JSON object a request on stdout")
    parser.epilog = (
        'example: twotower generate bundle "France is a country" '
        "--threshold 0.8 --max-new-tokens 64"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.bundle import Bundle, flags_of_bundle
    from twotower.runtime import Request

    with opened_session(args, args.bundle) as model:
        for flag in flags_of_bundle(Bundle.open(args.bundle, contents=False)):
            print(f"warning: this quantized bundle {flag}", file=sys.stderr)
        config = GenerationConfig.from_mapping(generation_overrides(args), base=model.defaults)
        if args.prompt_file:
            prompts = read_prompts(Path(args.prompt_file), config)
            requests = [Request(prompt, own) for prompt, own in prompts]
        elif args.tokens is not None:
            tokens = number_list(args.tokens, "--tokens", '"5 6 7"', int)
            requests = [Request(tokens, config)]
        else:
            requests = [Request(args.prompt, config)]
        if args.stream:
            _stream(model, requests, as_json=args.json)
            return 0
        with ProgressLine() as line:
            results = model.generate(
                requests, on_prefill=lambda done, total: line("reading the prompt", done, total)
            )
    for result in results:
        if args.json:
            print(json.dumps(result.to_json()))
        else:
            print(" ".join(map(str, result.tokens)) if result.text is None else result.text)
            print(_summary(result), file=sys.stderr)
    return 0


def _stream(model: TwoTower, requests: list[Request], *, as_json: bool) -> None:
    several = len(requests) > 1
    for event in model.stream(requests):
        if as_json:
            if event.result is not None:
                print(json.dumps(event.result.to_json()), flush=True)
            continue
        piece = event.text if event.text is not None else "".join(f"{t} " for t in event.tokens)
        if several:
            print(f"[{event.row}] {piece}", flush=True)
        else:
            print(
                piece,
                end="\n" if event.result is not None else "",
                flush=True,
            )
        if event.result is not None:
            print(_summary(event.result), file=sys.stderr)


def _summary(result: Generation) -> str:
    usage, ms = result.usage, result.timings.total
    rate = 1000 * usage.completion_tokens / ms if ms else 0.0
    facts = [
        f"{usage.completion_tokens} tokens ({result.finish_reason})",
        f"mode {result.mode}",
        f"{usage.nfe} passes, {usage.tokens_per_nfe:.2f} tokens a pass",
        f"{rate:.1f} tokens/s",
    ]
    if result.seed is not None:
        facts.append(f"seed {result.seed}")
    return f"-- {', '.join(facts)}"
