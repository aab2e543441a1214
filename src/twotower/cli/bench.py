"""`twotower bench`: how fast a bundle generates, or what an export costs; always with the thing it is compared to."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.cli.options import add_device_options, device_options
from twotower.config import GenerationConfig
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.bench import GenerationSpeed
    from twotower.bench.peers import Peer, PeerSpeed
    from twotower.runtime import TwoTower

__all__ = ["add_arguments", "run"]

_D = GenerationConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="measure generation on this bundle"
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="measure an export of a synthetic checkpoint beside a plain copy of it",
    )
    parser.add_argument(
        "--real-widths",
        action="store_true",
        help="the same with one layer of each kind at published widths: 8 GB, verified",
    )
    parser.add_argument(
        "--scratch",
        metavar="DIR",
        help="with --export: where to write (default: the system's temporary folder)",
    )
    parser.add_argument(
        "--target", metavar="T", help="engine to run (default: the best that is built and fits)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, metavar="N", help="length of each prompt (64)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate (64)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.8, metavar="X", help="commit threshold (0.8)"
    )
    parser.add_argument(
        "--rows", type=int, default=1, metavar="N", help="prompts generated together (1)"
    )
    parser.add_argument(
        "--runs", type=int, default=5, metavar="N", help="measured runs of each mode (5)"
    )
    parser.add_argument(
        "--beside",
        metavar="BUNDLE2",
        help="another bundle to measure in turns with this one: the float bundle a quantized one was made from, or a copy "
        "that was built in another way; ratios are of one run",
    )
    parser.add_argument(
        "--peers",
        metavar="LIST",
        help="also time other programs on the context tower's weights, greedy, in turns with our autoregression: "
        "transformers. Of a quantized bundle they run the float bundle it is beside",
    )
    add_device_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
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
        do = "`twotower bench BUNDLE` or `twotower bench --export`"
        raise ConfigError("nothing to measure", found="neither a bundle nor --export", do=do)
    print(json.dumps(facts) if args.json else "\n".join(lines))
    return 0


def _generation(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from twotower.bench import measure_in_turns
    from twotower.cli.progress import ProgressLine, opening
    from twotower.runtime import TwoTower

    config = GenerationConfig(
        max_new_tokens=args.max_new_tokens, confidence_threshold=args.threshold
    )
    peers = _opened_peers(
        args
    )  # first, so that a peer that is not there is said before minutes of work
    line = ProgressLine()
    options = {"max_batch": max(args.rows, 1), **device_options(args), **opening(line)}
    with ExitStack() as opened:
        paths = [args.bundle, *([args.beside] if args.beside else [])]
        models = [
            opened.enter_context(TwoTower.open(path, target=args.target, **options))
            for path in paths
        ]
        line.end()
        _require_one_vocabulary(paths, models)
        speeds = measure_in_turns(
            models, config, prompt_tokens=args.prompt_tokens, rows=args.rows, runs=args.runs
        )
        beside = [_beside(args, models[0], peer) for peer in peers]
    diffusion, ar = speeds[0]
    ratio = diffusion.tokens_per_second / ar.tokens_per_second
    # A pass is worth so many tokens of AR; fewer tokens a pass than that, and diffusion loses.
    break_even = diffusion.tokens_per_nfe / ratio
    facts = {"rows": args.rows, "diffusion": diffusion.to_json(), "ar": ar.to_json()}
    facts |= {"diffusion_to_ar": ratio, "break_even_tokens_per_nfe": break_even}
    lines = [
        *_table(speeds[0]),
        f"diffusion is {ratio:.2f}x autoregression here; it breaks even at {break_even:.2f} tokens a pass",
    ]
    if args.beside:
        facts["beside"] = _beside_facts(args.beside, *speeds)
        lines += [
            "",
            f"beside {args.beside}, in turns:",
            *_table(speeds[1]),
            _ratio_line(facts["beside"]),
        ]
    if beside:
        facts["peers"] = [speed.to_json() for speed in beside]
        lines += [
            f"{p.name} {p.version} ({p.form}): {p.tokens_per_second:.1f} tokens/s, ours in turns {p.ours:.1f}: {p.ratio:.2f}x; "
            f"{p.equal_tokens:.1%} of tokens before a difference; {p.threads} threads each"
            for p in beside
        ]
    return facts, lines


def _table(speeds: Sequence[GenerationSpeed]) -> list[str]:
    """A row a mode."""
    return [
        f"{'':<11}{'tokens/s':>10}{'prefill ms':>12}{'pass ms':>10}{'extend ms':>11}{'tokens/pass':>13}{'passes/block':>14}",
        *(
            f"{s.mode:<11}{s.tokens_per_second:>10.1f}{s.prefill_ms:>12.2f}{s.pass_ms:>10.3f}{s.extend_ms:>11.3f}"
            f"{s.tokens_per_nfe:>13.2f}{s.steps_per_block:>14.2f}"
            for s in speeds
        ),
    ]


def _beside_facts(
    path: str, ours: Sequence[GenerationSpeed], theirs: Sequence[GenerationSpeed]
) -> dict[str, Any]:
    """The other bundle's figures, and how much faster this one is."""
    (diffusion, ar), (other, other_ar) = ours, theirs
    return {
        "bundle": path,
        "diffusion": other.to_json(),
        "ar": other_ar.to_json(),
        "ar_to_ar": ar.tokens_per_second / other_ar.tokens_per_second,
        "pass_to_pass": other.pass_ms / diffusion.pass_ms,
        "extend_to_extend": other.extend_ms / diffusion.extend_ms if diffusion.extend_ms else None,
        "prefill_to_prefill": other.prefill_ms / diffusion.prefill_ms,
    }


def _ratio_line(facts: Mapping[str, Any]) -> str:
    extend = facts["extend_to_extend"]
    extension = f", an extension {extend:.2f}x" if extend else ""
    return (
        f"this bundle is faster by: autoregression {facts['ar_to_ar']:.2f}x, a denoising pass {facts['pass_to_pass']:.2f}x{extension}, "
        f"reading the prompts {facts['prefill_to_prefill']:.2f}x"
    )


def _require_one_vocabulary(paths: Sequence[str], models: Sequence[TwoTower]) -> None:
    sizes = [model.config.vocab_size for model in models]
    if len(set(sizes)) > 1:
        raise ConfigError(
            "bundles of two models cannot be measured on the same prompts",
            found=f"{paths[0]} has {sizes[0]} tokens in its vocabulary, {paths[1]} has {sizes[1]}",
            do="name bundles of one model, quantized or built in another way",
        )


def _opened_peers(args: argparse.Namespace) -> list[Peer]:
    if not args.peers:
        return []
    from twotower.bench.peers import open_peer
    from twotower.bundle import Bundle
    from twotower.processors import usable_cores

    bundle = Bundle.open(args.bundle, contents=False)  # the session looks at its contents
    if bundle.quantization is not None and args.beside:
        bundle = Bundle.open(args.beside, contents=False)
    return [
        open_peer(name.strip(), bundle, threads=usable_cores()) for name in args.peers.split(",")
    ]


def _beside(args: argparse.Namespace, model: TwoTower, peer: Peer) -> PeerSpeed:
    from twotower.bench.peers import measure_peer
    from twotower.bench.speed import random_prompts
    from twotower.processors import usable_cores

    prompts = random_prompts(model.config, args.prompt_tokens, args.rows, seed=0)
    return measure_peer(
        model, peer, prompts, new_tokens=args.max_new_tokens, runs=args.runs, threads=usable_cores()
    )


def _export(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from twotower.extras import require_libraries

    require_libraries(
        "export", "torch", "onnx", "onnx_ir", "safetensors", what="measuring an export"
    )
    require_libraries("export,cpu", "onnxruntime", what="measuring an export")
    from twotower.bench import measure_export

    with tempfile.TemporaryDirectory(prefix="twotower-bench-", dir=args.scratch) as scratch:
        pattern = "ME*" if args.real_widths else None
        cost = measure_export(
            Path(scratch),
            pattern,
            verify=args.real_widths,
            say=lambda what: print(f"... {what}", file=sys.stderr),
        )
    lines = [
        f"checkpoint     {cost.checkpoint_bytes / 1e9:.2f} GB",
        f"plain copy     {cost.copy_seconds:.1f} s",
        f"export         {cost.export_seconds:.1f} s, {cost.ratio:.2f}x the copy",
        f"peak RssAnon   {cost.export_peak_bytes / 1e6:.0f} MB",
    ]
    if cost.verify_seconds is not None and cost.largest_error is not None:
        error = f"largest relative error {cost.largest_error:.1e} against torch in float32"
        lines.append(f"verification   {cost.verify_seconds:.0f} s, {error}")
    return cost.to_json(), lines
