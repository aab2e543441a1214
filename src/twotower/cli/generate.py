"""`twotower generate`: text or tokens from a bundle, by block diffusion or by the context tower alone."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.config import GenerationConfig
from twotower.errors import RequestError

if TYPE_CHECKING:
    from twotower.runtime import Generation, Request, TwoTower

__all__ = ["add_arguments", "run"]

_D = GenerationConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle with built engines")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue (needs a bundle with a tokenizer)")
    source.add_argument("--tokens", metavar='"5 6 7"', help="token ids to continue, separated by spaces or commas")
    source.add_argument(
        "--prompt-file", metavar="F.jsonl", help='one {"text": ...} or {"tokens": [...]} a line, with options of its own if wanted'
    )
    how = parser.add_argument_group("how to generate (defaults: the bundle's, which start as the ones shown)")
    how.add_argument("--mode", choices=("diffusion", "ar"), help=f"both towers, or the context tower alone ({_D.mode})")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help=f"tokens to generate at most ({_D.max_new_tokens})")
    how.add_argument("--block-size", type=int, metavar="S", help=f"tokens denoised together ({_D.block_size})")
    how.add_argument(
        "--steps", dest="steps_per_block", type=int, metavar="N", help=f"denoiser passes a block at most ({_D.steps_per_block})"
    )
    how.add_argument(
        "--threshold",
        dest="confidence_threshold",
        type=float,
        metavar="X",
        help=f"commit predictions more confident than this ({_D.confidence_threshold}; 0.8 is the published operating point)",
    )
    how.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (0)")
    how.add_argument("--top-k", type=int, metavar="N", help="sample among the N best tokens, 0 for all 64 kept candidates (0)")
    how.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling, ar mode only (1)")
    how.add_argument("--seed", type=int, metavar="N", help="same seed, same text, at any batch size (0)")
    how.add_argument("--stop", action="append", metavar="STR", help="end the text before this string; may be repeated")
    how.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end-of-sequence token")
    how.add_argument(
        "--allow-untrained-block-size",
        action="store_true",
        default=None,
        help="permit a block size above the trained one (quality collapses)",
    )
    parser.add_argument("--target", metavar="T", help="engine to run (default: the best that is built and fits this machine)")
    parser.add_argument("--max-batch", type=int, default=8, metavar="N", help="prompts generated together at most (8)")
    parser.add_argument("--max-context", type=int, metavar="N", help="longest text, prompt and answer (default: the model's)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads of a CPU engine (0: the library's choice)")
    parser.add_argument("--stream", action="store_true", help="print each block as it is committed")
    parser.add_argument("--json", action="store_true", help="print one JSON object a request on stdout")
    parser.epilog = 'example: twotower generate bundle "France is a country" --threshold 0.8 --max-new-tokens 64'


def run(args: argparse.Namespace) -> int:
    from twotower.cli.progress import ProgressLine
    from twotower.runtime import TwoTower

    overrides = {f.name: getattr(args, f.name) for f in fields(GenerationConfig) if getattr(args, f.name, None) is not None}
    line = ProgressLine()
    checking = ProgressLine()
    with TwoTower.open(
        args.bundle,
        target=args.target,
        max_batch=args.max_batch,
        max_context=args.max_context,
        threads=args.threads,
        progress=lambda done, total: checking("checking the bundle", done, total),
    ) as model:
        checking.end()
        requests = _requests(args, GenerationConfig.from_mapping(overrides, base=model.defaults))
        if args.stream:
            return _stream(model, requests, as_json=args.json)
        results = model.generate(requests, on_prefill=lambda done, total: line("reading the prompt", done, total))
        line.end()
    for result in results:
        print(json.dumps(result.to_json()) if args.json else _readable(result))
        if not args.json:
            print(_summary(result), file=sys.stderr)
    return 0


def _stream(model: TwoTower, requests: list[Request], *, as_json: bool) -> int:
    several = len(requests) > 1
    for event in model.stream(requests):
        if as_json:
            if event.result is not None:
                print(json.dumps(event.result.to_json()), flush=True)
            continue
        piece = event.text if event.text is not None else "".join(f"{t} " for t in event.tokens)
        print(f"[{event.row}] {piece}" if several else piece, end="\n" if several else "", flush=True)
        if event.result is not None:
            print("" if several else "\n", end="", flush=True)
            print(_summary(event.result), file=sys.stderr)
    return 0


def _requests(args: argparse.Namespace, config: GenerationConfig) -> list[Request]:
    from twotower.runtime import Request

    if args.prompt_file:
        return [Request(prompt, own) for prompt, own in _prompt_file(Path(args.prompt_file), config)]
    return [Request(args.prompt if args.tokens is None else _token_ids(args.tokens), config)]


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError as e:
        raise RequestError(f"--tokens {text!r} is not a list of token ids", found=str(e), do='write them like --tokens "5 6 7"') from e


def _prompt_file(path: Path, base: GenerationConfig) -> list[tuple[Any, GenerationConfig]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"cannot read the prompt file {path}", found=str(e), do="name a UTF-8 file with one JSON object a line") from e
    out = [_prompt_line(f"{path}, line {number}", line, base) for number, line in enumerate(lines, 1) if line.strip()]
    if not out:
        raise RequestError(f"the prompt file {path} has no prompts", found=f"{len(lines)} lines", do='write one {"text": ...} a line')
    return out


def _prompt_line(where: str, line: str, base: GenerationConfig) -> tuple[Any, GenerationConfig]:
    form = 'write {"text": "..."} or {"tokens": [5, 6, 7]}, with generation options beside it if wanted'
    try:
        data = json.loads(line)
    except ValueError as e:
        raise RequestError(f"{where} is not JSON", found=str(e), do=form) from e
    if not isinstance(data, dict) or ("text" in data) == ("tokens" in data):
        raise RequestError(f"{where} is not one prompt", found=line[:80], do=form)
    prompt = data.pop("text") if "text" in data else data.pop("tokens")
    ids = isinstance(prompt, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt)
    if not isinstance(prompt, str) and not ids:
        raise RequestError(f"{where}: the prompt is neither text nor a list of token ids", found=repr(prompt)[:80], do=form)
    return (prompt if isinstance(prompt, str) else tuple(prompt)), GenerationConfig.from_mapping(data, base=base)


def _readable(result: Generation) -> str:
    return result.text if result.text is not None else " ".join(map(str, result.tokens))


def _summary(result: Generation) -> str:
    usage, ms = result.usage, result.timings.total
    rate = 1000 * usage.completion_tokens / ms if ms else 0.0
    passes = f"{usage.nfe} passes, {usage.tokens_per_nfe:.2f} tokens a pass"
    return f"-- {usage.completion_tokens} tokens ({result.finish_reason}), {passes}, {rate:.1f} tokens/s"
