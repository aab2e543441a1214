"""`twotower trace`: every denoiser pass of one text, as a file, a page, a live picture, or set beside another's."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.live import LiveView, Words, pass_line
from twotower.cli.options import (
    add_generation_options,
    add_session_options,
    device_options,
    generation_overrides,
    token_ids,
)
from twotower.config import GenerationConfig
from twotower.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twotower.runtime import TwoTower
    from twotower.trace import Trace, TraceDiff

__all__ = ["add_arguments", "run"]

EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="BUNDLE|FILE.jsonl",
        nargs="?",
        help="a bundle with built engines, or a trace to show again; none with --diff",
    )
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="text to continue (needs a bundle with a tokenizer)",
    )
    parser.add_argument(
        "--tokens", metavar='"5 6 7"', help="token ids to continue, separated by spaces or commas"
    )
    out = parser.add_argument_group("what to do with the trace (default: print a line a pass)")
    out.add_argument(
        "-o",
        "--output",
        metavar="FILE.jsonl",
        help="write the trace: a header, a line a pass, a line a block, an end",
    )
    out.add_argument(
        "--html", metavar="FILE.html", help="write a self-contained page that plays it"
    )
    shown = out.add_mutually_exclusive_group()
    shown.add_argument(
        "--live",
        action="store_true",
        help="draw the block as it is written; of a trace file: replay it",
    )
    shown.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on stdout: the result and a summary of the passes",
    )
    out.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="compare two traces, or two bundles (BUNDLE or BUNDLE@TARGET) given PROMPT, and show where they part first",
    )
    add_generation_options(parser)
    add_session_options(parser)
    parser.epilog = (
        "Blocks, steps and positions count from 0. With --diff the exit code is 0 if every pass commits the same, and 1 if not.\n"
        'example: twotower trace bundle "France is a country" --html trace.html\n'
        'example: twotower trace --diff bundle bundle-int8 "France is a country"'
    )


def run(args: argparse.Namespace) -> int:
    from twotower.trace import read_trace
    from twotower.trace.file import check_output

    if args.diff:
        return _diff(args)
    for path in (args.output, args.html):
        if path:
            check_output(Path(path))
    if args.source is None:
        raise RequestError(
            "there is nothing to trace",
            found="neither a bundle nor a trace file was named",
            do='type twotower trace BUNDLE "PROMPT"',
        )
    if _is_trace_file(args.source):
        _refuse_request(
            args, f"{args.source} is a trace and has a prompt and options of its own", args.prompt
        )
        trace = read_trace(Path(args.source))
        if args.live:
            _replay(trace)
    else:
        trace = _recorded(args, args.source, _prompt(args.prompt, args.tokens), live=args.live)
    return _output(args, trace)


def _output(args: argparse.Namespace, trace: Trace) -> int:
    from twotower.trace import trace_page
    from twotower.trace.file import write_text, write_trace

    if args.output:
        write_trace(Path(args.output), trace)
    if args.html:
        write_text(Path(args.html), trace_page(trace))
    if args.json:
        print(json.dumps(_summary(trace)))
    elif not (args.output or args.html or args.live):
        words = _words(trace)
        print(LiveView.HEAD, *(pass_line(step, words) for step in trace.steps), sep="\n")
    for path in filter(None, (args.output, args.html)):
        print(f"wrote {path}", file=sys.stderr)
    if not args.json:
        print(_totals(trace), file=sys.stderr)
    return 0


def _recorded(
    args: argparse.Namespace,
    bundle: str,
    prompt: str | Sequence[int],
    *,
    config: GenerationConfig | None = None,
    live: bool = False,
) -> Trace:
    """A new trace of a bundle, `BUNDLE@TARGET` in a comparison; without a config the command line's on top of the bundle's."""
    from twotower.cli.progress import ProgressLine, opening
    from twotower.runtime import TwoTower
    from twotower.trace import record_trace

    folder, target = _folder_and_target(bundle) if args.diff else (bundle, None)
    line = ProgressLine()
    with TwoTower.open(
        folder,
        target=target or args.target,
        max_batch=1,
        max_context=args.max_context,
        threads=args.threads,
        preset=args.preset,
        **device_options(args),
        **opening(line),
    ) as model:
        line.end()
        config = config or GenerationConfig.from_mapping(
            generation_overrides(args), base=model.defaults
        )
        view = LiveView(_model_words(model)) if live else None
        trace = record_trace(model, prompt, config, bundle=Path(folder).resolve().name, watch=view)
        if view:
            view.end()
        return trace


def _prompt(text: str | None, tokens: str | None) -> str | tuple[int, ...]:
    if (text is None) == (tokens is None):
        found = "no prompt" if text is None else "both a text and --tokens"
        raise RequestError(
            "a trace is of one prompt", found=found, do='give either "PROMPT" or --tokens "5 6 7"'
        )
    return token_ids(tokens) if tokens is not None else str(text)


def _is_trace_file(name: str) -> bool:
    path = Path(name)
    return path.is_file() or (name.endswith(".jsonl") and not path.is_dir())


def _folder_and_target(name: str) -> tuple[str, str | None]:
    folder, at, target = name.rpartition("@")
    return (folder, target) if at and folder and not Path(name).exists() else (name, None)


def _refuse_request(args: argparse.Namespace, what: str, prompt: str | None) -> None:
    given = [
        name
        for name, value in (
            ("a prompt", prompt),
            ("--tokens", args.tokens),
            ("--preset", args.preset),
        )
        if value is not None
    ]
    given += sorted(generation_overrides(args))
    if given:
        raise RequestError(
            what,
            found=f"also given: {', '.join(given)}",
            do="leave these out, or name a bundle and record again",
        )


def _words(trace: Trace) -> Words:
    return Words(trace.piece, trace.header.mask_token_id, numbers=not trace.has_text)


def _model_words(model: TwoTower) -> Words:
    tokenizer = model.tokenizer
    return Words(
        tokenizer.piece if tokenizer else str, model.config.mask_token_id, numbers=tokenizer is None
    )


def _replay(trace: Trace) -> None:
    """Shows a trace file at the pace it was recorded at; somewhere that is no terminal, at once."""
    view = LiveView(_words(trace))
    for step in trace.steps:
        if sys.stdout.isatty():
            time.sleep(step.denoise_ms / 1000)
        view(step)
    view.end()


def _summary(trace: Trace) -> dict[str, Any]:
    from dataclasses import asdict

    passes = [
        {
            "block": s.block,
            "step": s.step,
            "committed": len(s.committed),
            "lowest_confidence": min((s.confidence[p] for p in s.committed), default=None),
            "denoise_ms": s.denoise_ms,
        }
        for s in trace.steps
    ]
    head = {
        "bundle": trace.header.bundle,
        "target": trace.header.target,
        "config": trace.header.config,
    }
    return {**head, **asdict(trace.end), "passes": passes}


def _totals(trace: Trace) -> str:
    usage, ms = trace.end.usage, trace.end.timings_ms
    return (
        f"-- {usage['completion_tokens']} tokens ({trace.end.finish_reason}), {len(trace.steps)} passes in {len(trace.blocks)} blocks, "
        f"{usage['tokens_per_nfe']:.2f} tokens a pass; prefill {ms['prefill']:.1f} ms, denoiser {ms['denoise']:.1f} ms, "
        f"context {ms['extend']:.1f} ms"
    )


def _diff(args: argparse.Namespace) -> int:
    from twotower.trace import diff_traces

    if args.output or args.html or args.live or args.prompt is not None:
        raise RequestError(
            "a comparison prints what it found and nothing else",
            found="one of -o, --html, --live or a second PROMPT beside --diff",
            do='type twotower trace --diff A B "PROMPT", with --json if wanted',
        )
    a, b = _both(args)
    diff = diff_traces(a, b)
    if args.json:
        names = [{"bundle": t.header.bundle, "target": t.header.target} for t in (a, b)]
        print(
            json.dumps(
                {
                    "a": names[0],
                    "b": names[1],
                    "threshold": a.header.config["confidence_threshold"],
                    **diff.to_json(),
                }
            )
        )
    else:
        print("\n".join(_told(a, b, diff)))
    return 0 if diff.equal else EXIT_DIFFERENT


def _both(args: argparse.Namespace) -> tuple[Trace, Trace]:
    """Both traces; what a trace file was asked is asked of a bundle beside it, and one bundle's defaults serve for both."""
    from twotower.trace import read_trace

    traces: list[Trace | None] = [
        read_trace(Path(name)) if _is_trace_file(name) else None for name in args.diff
    ]
    known = next((t for t in traces if t is not None), None)
    if known is not None:
        _refuse_request(
            args, "a trace has a prompt and options of its own, which serve for both", args.source
        )
        prompt: str | Sequence[int] = known.header.prompt_tokens
    else:
        prompt = _prompt(args.source, args.tokens)
    for i, name in enumerate(args.diff):
        if traces[i] is None:
            config = (
                GenerationConfig.from_mapping(known.header.config) if known is not None else None
            )
            known = traces[i] = _recorded(args, name, prompt, config=config)
    a, b = traces
    assert a is not None
    assert b is not None
    return a, b


def _told(a: Trace, b: Trace, diff: TraceDiff) -> list[str]:
    width = max(len(t.header.bundle) + len(t.header.target) + 3 for t in (a, b))
    lines = [
        f"{side}  {f'{t.header.bundle} ({t.header.target})':<{width}}  {len(t.steps)} passes, {len(t.end.tokens)} tokens"
        for side, t in (("A", a), ("B", b))
    ]
    if diff.sides is None:
        lines.append(
            "every pass commits the same"
            if diff.equal
            else "every pass commits the same, but the texts end differently"
        )
    else:
        lines.append(
            f"first difference: block {diff.block}, step {diff.step}, position {diff.position}"
        )
        for name, side in zip("AB", diff.sides, strict=True):
            if side.token is None:
                lines.append(f"  {name}  made no such pass")
            else:
                done = "committed" if side.committed else "left     "
                lines.append(
                    f"  {name}  {done}  token {side.token} {side.piece!r}, confidence {side.confidence:.6f}"
                )
        threshold = a.header.config["confidence_threshold"]
        of = {
            "threshold": f"from the threshold {threshold:g}",
            "confidence": "between the confidences",
        }
        lines += (
            [f"  margin {diff.margin:.6f} {of[diff.margin_of]}"]
            if diff.margin is not None and diff.margin_of
            else []
        )
    lines.append(f"confidences {'before that ' if diff.sides else ''}agree to {diff.agreed_to:.1e}")
    lines.append(
        "final tokens: equal"
        if diff.tokens_equal
        else f"final tokens: different from token {diff.first_token} on"
    )
    return lines
