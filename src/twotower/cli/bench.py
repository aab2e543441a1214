"""`twotower bench`: speed of generation, or time and memory of an export, beside a reference."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.options import add_device_options, adder, opened_session
from twotower.config import GenerationConfig
from twotower.errors import ConfigError
from twotower.report.tables import Column, Table
from twotower.units import format_bytes

if TYPE_CHECKING:
    from twotower.bench import GenerationSpeed
    from twotower.bench.peers import Peer
    from twotower.runtime import TwoTower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = adder(parser)
    add("bundle BUNDLE", "measure generation on this bundle", nargs="?")
    add("--export", "measure an export of a synthetic checkpoint beside a plain copy of it")
    add(
        "--real-widths",
        "the same with one layer of each kind at published widths: 7.5 GiB, verified",
    )
    add("--scratch DIR", "with --export: where to write (default: the system's temporary folder)")
    add("--target T", "engine to run (default: the best that is built and fits)")
    add("--prompt-tokens N", "length of each prompt", default=64)
    add("--max-new-tokens N", "tokens to generate", default=64)
    add("--threshold X", "commit threshold", default=0.8)
    add("--rows N", "prompts generated together", default=1)
    add("--runs N", "measured runs of each mode", default=5)
    add(
        "--beside BUNDLE2",
        "another bundle to measure interleaved with this one: the float bundle a quantized "
        "one was made from, or a copy with other engines; ratios are of one run",
    )
    add(
        "--peers LIST",
        "also time other programs on the context tower's weights, greedy, interleaved with "
        "our autoregression: transformers. Of a quantized bundle they run the float bundle of "
        "--beside",
    )
    add_device_options(parser)
    add("--json", "print one JSON object on stdout")
    parser.epilog = (
        "example: twotower bench bundle --rows 4\n"
        "example: twotower bench bundle --peers transformers --json\n"
        "example: twotower bench q4 --beside bundle --peers transformers"
    )


def run(args: argparse.Namespace) -> int:
    if args.export or args.real_widths:
        facts, lines = _export(args)
    elif args.bundle:
        facts, lines = _generation(args)
    else:
        raise ConfigError(
            "nothing to measure",
            found="neither a bundle nor --export",
            do="`twotower bench BUNDLE` or `twotower bench --export`",
        )
    print(json.dumps(facts) if args.json else "\n".join(lines))
    return 0


def _generation(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from twotower.bench import measure_in_turns
    from twotower.bench.peers import measure_peer
    from twotower.bench.speed import random_prompts

    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, confidence_threshold=args.threshold
    )
    # First, so that a peer that is missing is reported before minutes of work.
    peers = _opened_peers(args)
    with ExitStack() as stack:
        paths = [args.bundle, *([args.beside] if args.beside else [])]
        models = [
            stack.enter_context(opened_session(args, path, max_batch=max(args.rows, 1)))
            for path in paths
        ]
        _require_one_vocabulary(paths, models)
        speeds = measure_in_turns(
            models, config, prompt_tokens=args.prompt_tokens, rows=args.rows, runs=args.runs
        )
        prompts = random_prompts(
            models[0].config,
            args.prompt_tokens,
            args.rows,
            seed=0,
        )
        how = {"new_tokens": args.max_new_tokens, "runs": args.runs}
        rivals = [measure_peer(models[0], peer, prompts, **how) for peer in peers]
    diffusion, ar = speeds[0]
    ratio = diffusion.tokens_per_second / ar.tokens_per_second
    # A pass is worth so many tokens of AR; fewer tokens a pass than that, and diffusion loses.
    break_even = diffusion.tokens_per_nfe / ratio
    facts: dict[str, Any] = {
        "rows": args.rows,
        "diffusion": diffusion.to_json(),
        "ar": ar.to_json(),
        "diffusion_to_ar": ratio,
        "break_even_tokens_per_nfe": break_even,
    }
    lines = [
        *_table(speeds[0]),
        f"diffusion is {ratio:.2f}x autoregression here; "
        f"it breaks even at {break_even:.2f} tokens a pass",
    ]
    if args.beside:
        facts["beside"], said = _beside(args.beside, *speeds)
        lines += said
    if rivals:
        facts["peers"] = [speed.to_json() for speed in rivals]
        lines += [
            f"{p.name} {p.version} ({p.form}): {p.tokens_per_second:.1f} tokens/s, ours "
            f"interleaved {p.ours:.1f}: {p.ratio:.2f}x; {p.equal_tokens:.1%} of tokens before a "
            f"difference; {p.threads} threads each"
            for p in rivals
        ]
    return facts, lines


def _require_one_vocabulary(paths: Sequence[str], models: Sequence[TwoTower]) -> None:
    sizes = [model.config.vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise ConfigError(
            "bundles of two models cannot be measured on the same prompts",
            found=f"{paths[0]} has {sizes[0]} tokens in its vocabulary, {paths[1]} has {sizes[1]}",
            do="name bundles of one model, quantized or built in another way",
        )


def _table(speeds: Sequence[GenerationSpeed]) -> list[str]:
    """A row a mode."""
    table = Table(
        [
            Column("", left=True, of="mode"),
            Column("tokens/s", ".1f", of="tokens_per_second"),
            Column("prefill ms", ".2f", of="prefill_ms"),
            Column("pass ms", ".3f", of="pass_ms"),
            Column("extend ms", ".3f", of="extend_ms"),
            Column("tokens/pass", ".2f", of="tokens_per_nfe"),
            Column("passes/block", ".2f", of="steps_per_block"),
        ]
    )
    for speed in speeds:
        table.add_facts(speed.to_json())
    return table.text()


def _beside(
    path: str, ours: Sequence[GenerationSpeed], theirs: Sequence[GenerationSpeed]
) -> tuple[dict[str, Any], list[str]]:
    """The other bundle's figures, and how much faster this one is."""
    (diffusion, ar), (other, other_ar) = ours, theirs
    facts = {
        "bundle": path,
        "diffusion": other.to_json(),
        "ar": other_ar.to_json(),
        "ar_to_ar": ar.tokens_per_second / other_ar.tokens_per_second,
        "pass_to_pass": other.pass_ms / diffusion.pass_ms,
        "extend_to_extend": other.extend_ms / diffusion.extend_ms if diffusion.extend_ms else None,
        "prefill_to_prefill": other.prefill_ms / diffusion.prefill_ms,
    }
    names = {
        "autoregression": "ar_to_ar",
        "a denoising pass": "pass_to_pass",
        "an extension": "extend_to_extend",
        "reading the prompts": "prefill_to_prefill",
    }
    faster = ", ".join(f"{name} {facts[key]:.2f}x" for name, key in names.items() if facts[key])
    return facts, [
        "",
        f"beside {path}, interleaved:",
        *_table(theirs),
        f"this bundle is faster by: {faster}",
    ]


def _opened_peers(args: argparse.Namespace) -> list[Peer]:
    if not args.peers:
        return []
    from twotower.bench.peers import open_peer
    from twotower.bundle import Bundle
    from twotower.processors import usable_cores

    bundle = Bundle.open(args.bundle, contents=False)  # the session looks at its contents
    if bundle.quantization is not None and args.beside:
        bundle = Bundle.open(args.beside, contents=False)
    names = args.peers.split(",")
    return [open_peer(name.strip(), bundle, threads=usable_cores()) for name in names]


def _export(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from twotower.extras import require_libraries

    what = "measuring an export"
    require_libraries("export", "torch", "onnx", "onnx_ir", "safetensors", what=what)
    require_libraries("export,cpu", "onnxruntime", what=what)
    from twotower.bench import measure_export

    with tempfile.TemporaryDirectory(prefix="twotower-bench-", dir=args.scratch) as scratch:
        cost = measure_export(
            Path(scratch),
            "ME*" if args.real_widths else None,
            verify=args.real_widths,
            say=lambda what: print(f"... {what}", file=sys.stderr),
        )
    lines = [
        f"checkpoint     {format_bytes(cost.checkpoint_bytes)}",
        f"plain copy     {cost.copy_seconds:.1f} s",
        f"export         {cost.export_seconds:.1f} s, {cost.ratio:.2f}x the copy",
        f"peak RssAnon   {format_bytes(cost.export_peak_bytes)}",
    ]
    if cost.verify_seconds is not None and cost.largest_error is not None:
        lines.append(
            f"verification   {cost.verify_seconds:.0f} s, largest relative error "
            f"{cost.largest_error:.1e} against torch in float32"
        )
    return cost.to_json(), lines
