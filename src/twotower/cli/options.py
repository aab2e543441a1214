"""Options that several verbs share, the values they stand for, and the session they open."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from twotower.cli.progress import ProgressLine, opening
from twotower.config import MODES, GenerationConfig
from twotower.errors import ConfigError

if TYPE_CHECKING:
    from twotower.bundle import Bundle
    from twotower.evaluate.suite import Suite
    from twotower.runtime import TwoTower

__all__ = [
    "add_device_options",
    "add_generation_options",
    "add_session_options",
    "add_suite_options",
    "byte_size",
    "checked_bundle",
    "chosen_suite",
    "device_options",
    "generation_overrides",
    "number_list",
    "opened_session",
]

_D = GenerationConfig()
_Number = TypeVar("_Number", int, float)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """One option a field of `GenerationConfig`; those not given stay None."""
    group = parser.add_argument_group(
        "how to generate (defaults: the bundle's, which start as the ones shown)"
    )
    add = group.add_argument
    add(
        "--mode",
        choices=MODES,
        help="diffusion: both towers; ar: the context tower alone; auto: the one expected to be "
        f"faster for each batch, which the result names ({_D.mode})",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most ({_D.max_new_tokens})",
    )
    add("--block-size", type=int, metavar="S", help=f"tokens denoised together ({_D.block_size})")
    add(
        "--steps",
        dest="steps_per_block",
        type=int,
        metavar="N",
        help=f"denoiser passes a block at most ({_D.steps_per_block})",
    )
    add(
        "--threshold",
        dest="confidence_threshold",
        type=float,
        metavar="X",
        help=f"commit predictions more confident than this ({_D.confidence_threshold}; "
        "0.8 is the published operating point)",
    )
    add("--temperature", type=float, metavar="X", help="0 is greedy (0)")
    add(
        "--top-k",
        type=int,
        metavar="N",
        help="sample among the N best tokens, 0 for all 64 kept candidates (0)",
    )
    add("--top-p", type=float, metavar="X", help="nucleus sampling, ar mode only (1)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the noise at a temperature above 0: with it the same prompt gives the same "
        "text, in any batch (default: drawn for each prompt, and reported with its text)",
    )
    add(
        "--stop",
        action="append",
        metavar="STR",
        help="end the text before this string; may be repeated",
    )
    switch: dict[str, Any] = {"action": "store_true", "default": None}
    add("--ignore-eos", **switch, help="go on past the end-of-sequence token")
    add(
        "--allow-untrained-block-size",
        **switch,
        help="permit a block size above the trained one (quality collapses)",
    )


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """What `TwoTower.open` takes, the size of a batch left out."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="start from this preset of the bundle instead of its default (see `twotower tune`)",
    )
    _add_engine_options(parser)
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="longest text, prompt and answer (default: the model's)",
    )
    add_device_options(parser)


def _add_engine_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--target",
        metavar="T",
        help="engine to run (default: the best that is built and fits this machine)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of a CPU engine (0: one for each usable core, one for a small model)",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where a GPU engine runs, and how its passes are launched."""
    parser.add_argument(
        "--devices",
        metavar="LIST",
        help="GPUs by number (default: 0); of two, the first takes the context tower, e.g. 0,1; "
        "segments are spread over more",
    )
    parser.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="launch every kernel of a pass by itself instead of replaying a captured CUDA graph",
    )
    parser.add_argument(
        "--warm-up",
        metavar="LIST",
        help="batch sizes whose kernels are compiled while the engines are opened, e.g. 1,8 "
        "(default: none; they are compiled when they first run, and cached)",
    )


def add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Which problems are answered, and with which engine."""
    group = parser.add_argument_group("which problems")
    group.add_argument(
        "--suite",
        metavar="F.jsonl",
        help='a problem a line: {"kind": ..., "prompt": ..., "answer": ...} '
        "(default: the suite of this package)",
    )
    group.add_argument("--kinds", metavar="A,B", help="only these kinds")
    group.add_argument("--limit", type=int, metavar="N", help="only N problems of each kind")
    group.add_argument(
        "--max-new-tokens", type=int, default=160, metavar="N", help="longest answer (%(default)s)"
    )
    _add_engine_options(group)
    add_device_options(parser)


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_device_options` as `TwoTower.open` takes them.

    Raises:
        ConfigError: a list is none of numbers.
    """
    return {
        "devices": number_list(args.devices, "--devices", "0,1", int),
        "graphs": not args.no_cuda_graphs,
        "warm_up": number_list(args.warm_up, "--warm-up", "1,8", int),
    }


@contextmanager
def opened_session(args: argparse.Namespace, bundle: str, **options: Any) -> Iterator[TwoTower]:
    """A bundle opened with the options of the command line; progress is shown.

    Args:
        args: With the device options, and any of the options named below.
        bundle: Its folder.
        options: Of `TwoTower.open`, before those of the command line.
    """
    from twotower.runtime import TwoTower

    line = ProgressLine()
    names = ("target", "threads", "preset", "max_context", "max_batch")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    with TwoTower.open(
        bundle,
        **{**given, **device_options(args), **options},
        **opening(line),
    ) as model:
        line.end()
        yield model


def checked_bundle(path: str) -> Bundle:
    """A bundle whose files are compared with its manifest; progress is shown."""
    from twotower.bundle import Bundle

    line = ProgressLine()
    try:
        return Bundle.open(path, progress=opening(line)["progress"])
    finally:
        line.end()


def chosen_suite(args: argparse.Namespace) -> Suite:
    """The suite of `add_suite_options`, narrowed to the kinds and the number asked for."""
    from twotower.evaluate.suite import load_suite

    suite = load_suite(Path(args.suite) if args.suite else None)
    kinds = (word.strip() for word in (args.kinds or "").split(","))
    return suite.only(kinds=tuple(filter(None, kinds)), limit=args.limit)


def generation_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that were given."""
    names = {field.name for field in fields(GenerationConfig)}
    return {
        name: value for name, value in vars(args).items() if name in names and value is not None
    }


def number_list(
    text: str | None, flag: str, example: str, number: Callable[[str], _Number]
) -> tuple[_Number, ...]:
    """The numbers of an option, separated by commas or spaces; none if it was not given.

    Raises:
        ConfigError: something else is among them.
    """
    try:
        return tuple(number(word) for word in (text or "").replace(",", " ").split())
    except ValueError as e:
        raise ConfigError(
            f"{flag} {text!r} is not a list of numbers",
            found=str(e),
            do=f"write e.g. {flag} {example}",
        ) from e


def byte_size(text: str | None, flag: str) -> int | None:
    """The bytes of a flag, written e.g. 16G; None if it was not given.

    Raises:
        ConfigError: it is not a size.
    """
    if text is None:
        return None
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    unit = units.get(text[-1:].upper())
    try:
        return round(float(text[:-1]) * unit if unit else float(text))
    except ValueError as e:
        raise ConfigError(
            f"{flag} {text!r} is not a size", found=str(e), do="write bytes, or e.g. 16G"
        ) from e
