"""`twotower generate`: text or tokens from a bundle, by block diffusion or by the context tower alone."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.cli.options import (
    add_generation_options,
    add_session_options,
    device_options,
    generation_overrides,
    token_ids,
)
from twotower.cli.prompts import read_prompts
from twotower.config import GenerationConfig

if TYPE_CHECKING:
    from twotower.runtime import Generation, Request, TwoTower

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle with built engines")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text to continue (needs a bundle with a tokenizer)",
    )
    source.add_argument(
        "--tokens", metavar='"5 6 7"', help="token ids to continue, separated by spaces or commas"
    )
    source.add_argument(
        "--prompt-file",
        metavar="F.jsonl",
        help='one {"text": ...} or {"tokens": [...]} a line, with options of its own if wanted',
    )
    add_generation_options(parser)
    add_session_options(parser)
    parser.add_argument(
        "--max-batch",
        type=int,
        default=8,
        metavar="N",
        help="prompts generated together at most (8)",
    )
    parser.add_argument("--stream", action="store_true", help="print each block as it is committed")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object a request on stdout"
    )
    parser.epilog = 'example: twotower generate bundle "France is a country" --threshold 0.8 --max-new-tokens 64'


def run(args: argparse.Namespace) -> int:
    from twotower.cli.progress import ProgressLine, opening
    from twotower.runtime import TwoTower

    line = ProgressLine()
    checking = ProgressLine()
    with TwoTower.open(
        args.bundle,
        target=args.target,
        max_batch=args.max_batch,
        max_context=args.max_context,
        threads=args.threads,
        preset=args.preset,
        **device_options(args),
        **opening(checking),
    ) as model:
        checking.end()
        _warn(args.bundle)
        requests = _requests(
            args, GenerationConfig.from_mapping(generation_overrides(args), base=model.defaults)
        )
        if args.stream:
            return _stream(model, requests, as_json=args.json)
        results = model.generate(
            requests, on_prefill=lambda done, total: line("reading the prompt", done, total)
        )
        line.end()
    for result in results:
        print(json.dumps(result.to_json()) if args.json else _readable(result))
        if not args.json:
            print(_summary(result), file=sys.stderr)
    return 0


def _warn(path: str) -> None:
    """Says of a quantized bundle what its measurement found wrong."""
    from twotower.bundle import Bundle, flags_of_bundle

    for flag in flags_of_bundle(Bundle.open(path, contents=False)):
        print(f"warning: this quantized bundle {flag}", file=sys.stderr)


def _stream(model: TwoTower, requests: list[Request], *, as_json: bool) -> int:
    several = len(requests) > 1
    for event in model.stream(requests):
        if as_json:
            if event.result is not None:
                print(json.dumps(event.result.to_json()), flush=True)
            continue
        piece = event.text if event.text is not None else "".join(f"{t} " for t in event.tokens)
        print(
            f"[{event.row}] {piece}" if several else piece, end="\n" if several else "", flush=True
        )
        if event.result is not None:
            print("" if several else "\n", end="", flush=True)
            print(_summary(event.result), file=sys.stderr)
    return 0


def _requests(args: argparse.Namespace, config: GenerationConfig) -> list[Request]:
    from twotower.runtime import Request

    if args.prompt_file:
        return [
            Request(prompt, own) for prompt, own in read_prompts(Path(args.prompt_file), config)
        ]
    return [Request(args.prompt if args.tokens is None else token_ids(args.tokens), config)]


def _readable(result: Generation) -> str:
    return result.text if result.text is not None else " ".join(map(str, result.tokens))


def _summary(result: Generation) -> str:
    usage, ms = result.usage, result.timings.total
    rate = 1000 * usage.completion_tokens / ms if ms else 0.0
    passes = f"{usage.nfe} passes, {usage.tokens_per_nfe:.2f} tokens a pass"
    tokens = f"{usage.completion_tokens} tokens ({result.finish_reason})"
    facts = [tokens, f"mode {result.mode}", passes, f"{rate:.1f} tokens/s"]
    facts += [f"seed {result.seed}"] if result.seed is not None else []
    return f"-- {', '.join(facts)}"
