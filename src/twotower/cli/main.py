"""The command tree: parses, runs one verb, and turns errors into one paragraph and an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from twotower import __version__
from twotower.cli.progress import Interrupts
from twotower.errors import TwoTowerError
from twotower.extras import missing_library

VERBS = {
    "inspect": "show what a checkpoint, bundle, ONNX graph or engine contains",
    "plan": "estimate the memory, disk and time a model takes on a GPU, before building anything",
    "export": "export a checkpoint to a bundle of ONNX graphs",
    "calibrate": "record activation ranges while generating, for int8 and fp8 quantization",
    "quantize": "quantize a bundle by a recipe, or search formats within a quality budget",
    "build": "build a bundle's engines for a target: ONNX Runtime or TensorRT",
    "generate": "generate text (or tokens) from a bundle",
    "trace": "record a generation step by step; save, replay as HTML, watch live or diff",
    "evaluate": "measure quality and speed of diffusion against autoregression",
    "tune": "find the fastest settings within a quality budget, stored as presets of a new bundle",
    "doctor": "check what this machine can run, and whether it computes correctly",
    "bench": "benchmark export and generation",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The argument tree; `only` that verb's module is imported for its arguments, None: all are."""
    parser = argparse.ArgumentParser(
        prog="twotower",
        description="Deploy Nemotron-Labs-TwoTower: export each tower to ONNX, build engines, "
        "generate with block diffusion.",
        epilog="Start with `twotower inspect CHECKPOINT`. The usual order is export, build, "
        "generate; `twotower VERB --help` explains one verb.",
    )
    parser.add_argument("--version", action="version", version=f"twotower {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", help="show the stack of an error and debug logging"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if only in (None, name):
            module = importlib.import_module(f"twotower.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0, 2 for an error the user can mend, 130 when interrupted, or the verb's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((w for w in words if w in VERBS), None)
    args = build_parser(verb).parse_args(words)
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        with Interrupts():
            try:
                return int(args.run(args))
            finally:
                # So that a closed pipe raises inside our handler and not at shutdown.
                sys.stdout.flush()
    except TwoTowerError as e:
        return _refused(e, e, debug=args.debug)
    except ModuleNotFoundError as e:
        # Verbs say beforehand what they need; this is for a path that nobody thought of.
        missing = missing_library(e, f"`twotower {args.verb}`")
        if missing is None:
            raise
        return _refused(missing, e, debug=args.debug)
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        # What is still in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _refused(error: TwoTowerError, cause: Exception, *, debug: bool) -> int:
    if debug:
        raise cause
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return EXIT_USER_ERROR
