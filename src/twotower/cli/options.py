"""Options that several verbs share: how to generate, with which engine, from which tokens."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from twotower.config import MODES, GenerationConfig
from twotower.errors import ConfigError, RequestError

__all__ = [
    "add_device_options",
    "add_generation_options",
    "add_session_options",
    "byte_size",
    "device_options",
    "generation_overrides",
    "token_ids",
    "whole_numbers",
]

_D = GenerationConfig()


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """One option a field of `GenerationConfig`; those not given stay None."""
    how = parser.add_argument_group(
        "how to generate (defaults: the bundle's, which start as the ones shown)"
    )
    how.add_argument(
        "--mode",
        choices=MODES,
        help="both towers, the context tower alone, or the one that is expected to be faster for "
        f"each batch, which the result names ({_D.mode})",
    )
    how.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most ({_D.max_new_tokens})",
    )
    how.add_argument(
        "--block-size", type=int, metavar="S", help=f"tokens denoised together ({_D.block_size})"
    )
    how.add_argument(
        "--steps",
        dest="steps_per_block",
        type=int,
        metavar="N",
        help=f"denoiser passes a block at most ({_D.steps_per_block})",
    )
    how.add_argument(
        "--threshold",
        dest="confidence_threshold",
        type=float,
        metavar="X",
        help=f"commit predictions more confident than this ({_D.confidence_threshold}; 0.8 is the published operating point)",
    )
    how.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (0)")
    how.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        help="sample among the N best tokens, 0 for all 64 kept candidates (0)",
    )
    how.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling, ar mode only (1)")
    how.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the noise at a temperature above 0: with it the same prompt gives the same "
        "text, in any batch (default: drawn for each prompt, and told with its text)",
    )
    how.add_argument(
        "--stop",
        action="append",
        metavar="STR",
        help="end the text before this string; may be repeated",
    )
    how.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="go on past the end-of-sequence token",
    )
    how.add_argument(
        "--allow-untrained-block-size",
        action="store_true",
        default=None,
        help="permit a block size above the trained one (quality collapses)",
    )


def add_session_options(parser: argparse.ArgumentParser) -> None:
    """What `TwoTower.open` takes, the size of a batch left out."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="start from this preset of the bundle instead of its default (see `twotower tune`)",
    )
    parser.add_argument(
        "--target",
        metavar="T",
        help="engine to run (default: the best that is built and fits this machine)",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="longest text, prompt and answer (default: the model's)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of a CPU engine (0: one a usable core, one for a small model)",
    )
    add_device_options(parser)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where a GPU engine runs, and how its passes are launched."""
    parser.add_argument(
        "--devices",
        metavar="LIST",
        help="GPUs by number (default: 0); of two, the first takes the context tower, e.g. 0,1; segments are spread over more",
    )
    parser.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="launch every pass piece by piece instead of replaying a captured CUDA graph",
    )
    parser.add_argument(
        "--warm-up",
        metavar="LIST",
        help="numbers of rows whose kernels are compiled while the engines are opened, e.g. 1,8 "
        "(default: none; they are compiled when they first run, and kept)",
    )


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """The same as `TwoTower.open` takes them.

    Raises:
        ConfigError: the list of GPUs is none.
    """
    try:
        devices = tuple(int(word) for word in args.devices.split(",")) if args.devices else ()
    except ValueError as e:
        raise ConfigError(
            f"--devices {args.devices!r} is not a list of GPUs",
            found=str(e),
            do="write numbers, e.g. --devices 0,1",
        ) from e
    warm_up = _row_counts(args.warm_up)
    return {"devices": devices, "graphs": not args.no_cuda_graphs, "warm_up": warm_up}


def _row_counts(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        what, do = f"--warm-up {text!r} is not a list of numbers", "write e.g. --warm-up 1,8"
        raise ConfigError(what, found=str(e), do=do) from e


def generation_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that were given."""
    return {
        f.name: getattr(args, f.name)
        for f in fields(GenerationConfig)
        if getattr(args, f.name, None) is not None
    }


def token_ids(text: str) -> tuple[int, ...]:
    """The ids of `--tokens`.

    Raises:
        RequestError: something else is among them.
    """
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError as e:
        raise RequestError(
            f"--tokens {text!r} is not a list of token ids",
            found=str(e),
            do='write them like --tokens "5 6 7"',
        ) from e


def whole_numbers(text: str | None) -> tuple[int, ...]:
    """The compute capabilities of `--sm`."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as e:
        raise ConfigError(
            f"--sm {text!r} is not a list of compute capabilities",
            found=str(e),
            do="write e.g. --sm 86,89,120",
        ) from e


def byte_size(text: str | None, flag: str = "--max-build-memory") -> int | None:
    """The bytes of a flag, written e.g. 16G."""
    if text is None:
        return None
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return round(float(number) * unit)
    except ValueError as e:
        raise ConfigError(
            f"{flag} {text!r} is not a size", found=str(e), do="write bytes, or e.g. 16G"
        ) from e
