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

_D = GenerationConfig()
_Number = TypeVar("_Number", int, float)


Adder = Callable[..., None]


def adder(container: argparse._ActionsContainer, group: str = "") -> Adder:
    """A function that adds an option to a parser, or to a new group of it.

    It takes the names as a usage line shows them, `-o --output FILE`, the help, and what else
    `add_argument` takes. Without a word for its value it is a switch; a default is shown and gives
    the type.
    """
    if group:
        container = container.add_argument_group(group)

    def add(names: str, text: str, **how: Any) -> None:
        words = names.split()
        flags = [word for word in words if word.startswith("-")] or words[:1]
        value = " ".join(words[len(flags) :])
        if value:
            how["metavar"] = value
        elif not how.keys() & {"action", "choices", "nargs"}:
            how["action"] = "store_true"
        if "action" not in how and how.get("default") is not None:
            how.setdefault("type", type(how["default"]))
            text += " (default: %(default)s)"
        container.add_argument(*flags, help=text, **how)

    return add


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """One option a field of `GenerationConfig`; those not given stay None."""
    add = adder(parser, "how to generate (defaults: the bundle's, which start as the ones shown)")
    add(
        "--mode",
        "diffusion: both towers; ar: the context tower alone; auto: the one expected to be "
        f"faster for each batch, which the result names ({_D.mode})",
        choices=MODES,
    )
    add("--max-new-tokens N", f"tokens to generate at most ({_D.max_new_tokens})", type=int)
    add("--block-size S", f"tokens denoised together ({_D.block_size})", type=int)
    add(
        "--steps N",
        f"denoiser passes a block at most ({_D.steps_per_block})",
        dest="steps_per_block",
        type=int,
    )
    add(
        "--threshold X",
        f"commit predictions more confident than this ({_D.confidence_threshold}; "
        "0.8 is the published operating point)",
        dest="confidence_threshold",
        type=float,
    )
    add("--temperature X", "0 is greedy (0)", type=float)
    add("--top-k N", "sample among the N best tokens, 0 for all 64 kept candidates (0)", type=int)
    add("--top-p X", "nucleus sampling, ar mode only (1)", type=float)
    add(
        "--seed N",
        "seed of the noise at a temperature above 0: with it the same prompt gives the same "
        "text, in any batch (default: drawn for each prompt, and reported with its text)",
        type=int,
    )
    add("--stop STR", "end the text before this string; may be repeated", action="append")
    add("--ignore-eos", "go on past the end-of-sequence token", default=None)
    add(
        "--allow-untrained-block-size",
        "permit a block size above the trained one (quality collapses)",
        default=None,
    )


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """What `TwoTower.open` takes, the size of a batch left out."""
    add = adder(parser)
    add(
        "--preset NAME",
        "start from this preset of the bundle instead of its default (see `twotower tune`)",
    )
    _add_engine_options(add)
    add("--max-context N", "longest text, prompt and answer (default: the model's)", type=int)
    add_device_options(parser)


def _add_engine_options(add: Adder) -> None:
    add("--target T", "engine to run (default: the best that is built and fits this machine)")
    add(
        "--threads N",
        "threads of a CPU engine, 0 for each usable core, or one for a small model",
        default=0,
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where a GPU engine runs, and how its passes are launched."""
    add = adder(parser)
    add(
        "--devices LIST",
        "GPUs by number (default: 0); of two, the first takes the context tower, e.g. 0,1; "
        "segments are spread over more",
    )
    add(
        "--no-cuda-graphs",
        "launch every kernel of a pass by itself instead of replaying a captured CUDA graph",
    )
    add(
        "--warm-up LIST",
        "batch sizes whose kernels are compiled while the engines are opened, e.g. 1,8 "
        "(default: none; they are compiled when they first run, and cached)",
    )


def add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Which problems are answered, and with which engine."""
    add = adder(parser, "which problems")
    add(
        "--suite F.jsonl",
        'a problem a line: {"kind": ..., "prompt": ..., "answer": ...} '
        "(default: the suite of this package)",
    )
    add("--kinds A,B", "only these kinds")
    add("--limit N", "only N problems of each kind", type=int)
    add("--max-new-tokens N", "longest answer", default=160)
    _add_engine_options(add)
    add_device_options(parser)


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `add_device_options` as `TwoTower.open` takes them; ConfigError for bad lists."""
    return {
        "devices": number_list(args.devices, "--devices", "0,1", int),
        "graphs": not args.no_cuda_graphs,
        "warm_up": number_list(args.warm_up, "--warm-up", "1,8", int),
    }


@contextmanager
def opened_session(args: argparse.Namespace, bundle: str, **options: Any) -> Iterator[TwoTower]:
    """A bundle opened with the options of the command line; progress is shown.

    `options` are of `TwoTower.open`; those of the command line come on top.
    """
    from twotower.runtime import TwoTower

    names = ("target", "threads", "preset", "max_context", "max_batch")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    options = {**given, **device_options(args), **options}
    with ProgressLine() as line:
        session = TwoTower.open(bundle, **options, **opening(line))
    with session:
        yield session


def checked_bundle(path: str) -> Bundle:
    """A bundle whose files are compared with its manifest; progress is shown."""
    from twotower.bundle import Bundle

    with ProgressLine() as line:
        return Bundle.open(path, progress=opening(line)["progress"])


def chosen_suite(args: argparse.Namespace) -> Suite:
    """The suite of `add_suite_options`, narrowed to the kinds and the number asked for."""
    from twotower.evaluate.suite import load_suite

    suite = load_suite(Path(args.suite) if args.suite else None)
    kinds = (word.strip() for word in (args.kinds or "").split(","))
    return suite.only(kinds=tuple(filter(None, kinds)), limit=args.limit)


def generation_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that were given."""
    return given_fields(args, GenerationConfig)


def given_fields(args: argparse.Namespace, options: type[Any]) -> dict[str, Any]:
    """What the command line gives of the fields of a dataclass, None left out."""
    given = ((field.name, getattr(args, field.name, None)) for field in fields(options))
    return {name: value for name, value in given if value is not None}


def number_list(
    text: str | None, flag: str, example: str, number: Callable[[str], _Number]
) -> tuple[_Number, ...]:
    """The numbers of an option, separated by commas or spaces; none if it was not given.

    ConfigError if something else is among them.
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
    """The bytes of a flag, written e.g. 16G, or ConfigError; None if it was not given."""
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
