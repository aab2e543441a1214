"""`twotower trace`: one text pass by pass, saved, replayed, watched, or compared with another."""

from __future__ import annotations

import argparse
import json
import sys
import time
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
from twotower.config import GenerationConfig
from twotower.errors import RequestError, TraceError
from twotower.files import require_place, write_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from twotower.trace import Trace

EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add(
        "source BUNDLE|FILE.jsonl",
        "a bundle with built engines, or a trace to show again; none with --diff",
        nargs="?",
    )
    add("prompt PROMPT", "text to continue (needs a bundle with a tokenizer)", nargs="?")
    add('--tokens "5 6 7"', "token ids to continue, separated by spaces or commas")
    out = parser.add_argument_group("what to do with the trace (default: print a line a pass)")
    add = adder(out)
    add(
        "-o --output FILE.jsonl", "write the trace: a header, a line a pass, a line a block, an end"
    )
    add("--html FILE.html", "write a self-contained page that replays it")
    shown = adder(out.add_mutually_exclusive_group())
    shown("--live", "draw the block while it is generated; of a trace file: replay it")
    shown("--json", "print one JSON object on stdout: the result and a summary of the passes")
    add(
        "--diff",
        "compare two traces, or two bundles (BUNDLE or BUNDLE@TARGET) given PROMPT, and show "
        "where they diverge first",
        nargs=2,
        metavar=("A", "B"),
    )
    add_generation_options(parser)
    add_session_options(parser)
    parser.epilog = (
        "Blocks, steps and positions count from 0. With --diff the exit code is 0 if every pass\n"
        "commits the same, and 1 if not.\n"
        'example: twotower trace bundle "France is a country" --html trace.html\n'
        'example: twotower trace --diff bundle bundle-int8 "France is a country"'
    )


def run(args: argparse.Namespace) -> int:
    from twotower.trace import read_trace, trace_page, write_trace
    from twotower.trace.terminal import LiveView, Words, pass_lines, summary, totals

    if args.diff:
        return _diff(args)
    files = [Path(path) for path in (args.output, args.html) if path]
    for path in files:
        require_place(path, error=TraceError)
    if args.source is None:
        raise RequestError(
            "there is nothing to trace",
            found="neither a bundle nor a trace file was named",
            do='type twotower trace BUNDLE "PROMPT"',
        )
    if _is_trace_file(args.source):
        what = f"{args.source} is a trace and has a prompt and options of its own"
        _refuse_request(args, what, args.prompt)
        trace = read_trace(Path(args.source))
        if args.live:
            view = LiveView(Words.of(trace))
            for step in trace.steps:
                if sys.stdout.isatty():  # at the pace it was recorded at
                    time.sleep(step.denoise_ms / 1000)
                view(step)
            view.end()
    else:
        trace = _recorded(
            args,
            args.source,
            _prompt(args.prompt, args.tokens),
        )
    if args.output:
        write_trace(Path(args.output), trace)
    if args.html:
        write_output(Path(args.html), trace_page(trace), error=TraceError)
    if args.json:
        print(json.dumps(summary(trace)))
    elif not (files or args.live):
        print("\n".join(pass_lines(trace)))
    for path in files:
        print(f"wrote {path}", file=sys.stderr)
    if not args.json:
        print(totals(trace), file=sys.stderr)
    return 0


def _recorded(
    args: argparse.Namespace,
    bundle: str,
    prompt: str | Sequence[int],
    config: GenerationConfig | None = None,
) -> Trace:
    """A new trace of a bundle, in a comparison of `BUNDLE@TARGET`.

    Without a config the command line's options are set on top of the bundle's.
    """
    from twotower.trace import record_trace
    from twotower.trace.terminal import LiveView, Words

    folder, at, target = bundle.rpartition("@")
    if not args.diff or not (at and folder) or Path(bundle).exists():
        folder, target = bundle, args.target
    options = {"target": target or args.target, "max_batch": 1}
    with opened_session(args, folder, **options) as model:
        if config is None:
            config = GenerationConfig.from_mapping(generation_overrides(args), base=model.defaults)
        view = None
        if args.live:
            tokenizer = model.tokenizer
            piece = tokenizer.piece if tokenizer else str
            view = LiveView(Words(piece, model.config.mask_token_id, numbers=tokenizer is None))
        trace = record_trace(model, prompt, config, bundle=Path(folder).resolve().name, watch=view)
        if view:
            view.end()
        return trace


def _prompt(text: str | None, tokens: str | None) -> str | tuple[int, ...]:
    if text is not None and tokens is None:
        return text
    if text is None and tokens is not None:
        return number_list(tokens, "--tokens", '"5 6 7"', int)
    raise RequestError(
        "a trace is of one prompt",
        found="no prompt" if text is None else "both a text and --tokens",
        do='give either "PROMPT" or --tokens "5 6 7"',
    )


def _is_trace_file(name: str) -> bool:
    path = Path(name)
    return path.is_file() or (name.endswith(".jsonl") and not path.is_dir())


def _refuse_request(args: argparse.Namespace, what: str, prompt: str | None) -> None:
    """Refuses a prompt and options beside a trace, which has its own."""
    values = {"a prompt": prompt, "--tokens": args.tokens, "--preset": args.preset}
    given = [name for name, value in values.items() if value is not None]
    given += sorted(generation_overrides(args))
    if given:
        raise RequestError(
            what,
            found=f"also given: {', '.join(given)}",
            do="leave these out, or name a bundle and record again",
        )


def _diff(args: argparse.Namespace) -> int:
    from twotower.trace import diff_traces
    from twotower.trace.terminal import diff_lines

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
        threshold = a.header.config["confidence_threshold"]
        facts = {
            "a": names[0],
            "b": names[1],
            "threshold": threshold,
            **diff.to_json(),
        }
        print(json.dumps(facts))
    else:
        print("\n".join(diff_lines(a, b, diff)))
    return 0 if diff.equal else EXIT_DIFFERENT


def _both(args: argparse.Namespace) -> list[Trace]:
    """Both traces of a comparison, those of bundles recorded now.

    A bundle is asked what the other's trace file was asked; of two, the first one's defaults serve.
    """
    from twotower.trace import read_trace

    read = {name: read_trace(Path(name)) for name in args.diff if _is_trace_file(name)}
    known = next(iter(read.values()), None)
    if known is not None:
        what = "a trace has a prompt and options of its own, which serve for both"
        _refuse_request(args, what, args.source)
        prompt: str | Sequence[int] = known.header.prompt_tokens
    else:
        prompt = _prompt(args.source, args.tokens)
    traces = []
    for name in args.diff:
        trace = read.get(name)
        if trace is None:
            config = GenerationConfig.from_mapping(known.header.config) if known else None
            trace = _recorded(args, name, prompt, config)
        known = known or trace
        traces.append(trace)
    return traces
