"""Prepares, on any machine and without a GPU, what a bare GPU machine without a network needs.

    make gpu-pack

Everything goes into `out/gpu-pack/call1` and `call2`, folders small enough to travel one by one
beside a checkout. What is there already and was made from the same sources is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu import prepare
from tools.gpu.questions import CALL_SECONDS, QUESTIONS
from twotower.errors import ConfigError, TwoTowerError

__all__ = ["Step", "main", "make_step"]

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60_000_000
"""Bytes of a folder at most."""

EXIT_FAILED, EXIT_USER_ERROR = 1, 2


@dataclass(frozen=True, slots=True)
class Step:
    """One piece of the pack.

    Attributes:
        name: A word for `--only`.
        made: What it makes, relative to the pack; all of it is removed before it is made again.
        make: Makes it in the pack's folder.
        key: What it is made from, apart from the project's sources.
        sources: Whether it changes with the project's sources.
    """

    name: str
    made: tuple[str, ...]
    make: Callable[[Path], None]
    key: str
    sources: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Makes what is missing and prints the commands for the GPU machine; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="make gpu-pack", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out" / "gpu-pack",
        metavar="FOLDER",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--python", default="3.12", metavar="X.Y", help="of the GPU machine (%(default)s)"
    )
    parser.add_argument("--only", metavar="A,B", help="only these pieces")
    args = parser.parse_args(argv)
    steps = prepare_steps(args.python)
    only = args.only.split(",") if args.only else [step.name for step in steps]
    failed = False
    try:
        for step in steps:
            if step.name in only:
                failed = not make_step(step, args.out) or failed
        _check_sizes(args.out)
    except TwoTowerError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(commands(args.out))
    return EXIT_FAILED if failed else 0


def prepare_steps(python: str) -> tuple[Step, ...]:
    """All pieces, the quickest first."""
    rtx = f"tensorrt-rtx {prepare.rtx_version()}, Python {python}"
    return (
        Step("experts", ("call1/experts.tar.xz",), prepare.experts, prepare.TRITON),
        Step("bundles", ("call1/bundles.tar.xz",), prepare.bundles, ""),
        Step("rtx", ("call2/rtx",), prepare.rtx, rtx),
        Step("targets", ("call2/targets.tar.xz",), prepare.targets, rtx),
        Step("full-size", ("call2/full-size.tar.xz",), prepare.full_size, rtx),
        Step(
            "library",
            prepare.LIBRARY_FILES,
            lambda pack: prepare.library(pack, python),
            f"{rtx}, {prepare.carried()}",
            sources=False,
        ),
    )


def make_step(step: Step, pack: Path) -> bool:
    """Makes a piece unless it is there; whether it is there in the end. Says what it does."""
    stamp = pack / "made" / f"{step.name}.txt"
    key = f"{step.key}\n{_sources() if step.sources else ''}\n"
    there = all((pack / name).exists() for name in step.made)
    if there and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        print(f"{step.name}: is there")
        return True
    for name in step.made:
        shutil.rmtree(pack / name, ignore_errors=True)
        (pack / name).unlink(missing_ok=True)
    began = time.monotonic()
    try:
        step.make(pack)
    except ImportError as e:
        print(f"{step.name}: NOT made, a library is missing: {e}")
        return False
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(key, encoding="utf-8")
    size = sum(_size(pack / name) for name in step.made) / 1e6
    print(f"{step.name}: made, {size:.1f} MB in {time.monotonic() - began:.0f} s", flush=True)
    return True


def commands(pack: Path) -> str:
    """What to bring to the GPU machine and what to type there, call by call."""
    lines = [
        "",
        "On the GPU machine, in a checkout of this project, one call after the other. What the",
        "first brought stays: the second needs it. Results come home in OUT, three files each.",
    ]
    calls = [folder.name for folder in sorted(pack.glob("call*"))]
    for call in calls:
        names = [n for n, q in QUESTIONS.items() if call == f"call{q.call}"]
        limit = CALL_SECONDS[int(call.removeprefix("call"))]
        words = f"--sections {','.join(names)} --budget {limit} --out OUT/{call}"
        size = f"{_size(pack / call) / 1e6:.1f} MB"
        lines += [
            "",
            f"{call}: bring {pack / call} ({size}); {limit} s at most",
            f'    make gpu-first-hour ARGS="{words}"',
        ]
    results = " ".join(f"OUT/{call}/results.json" for call in calls)
    return "\n".join([*lines, "", "At home:", f'    make gpu-page ARGS="{results}"'])


def _check_sizes(pack: Path) -> None:
    for folder in sorted(pack.glob("call*")):
        size = _size(folder)
        if size > LIMIT:
            raise ConfigError(
                f"{folder} is too large for one transfer",
                found=f"{size:,} bytes, allowed: {LIMIT:,}",
                do="this is a defect of tools/gpu/pack.py: move a piece to the other call",
            )


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _sources() -> str:
    """One hash of every source file that what is prepared can depend on."""
    seen = hashlib.sha256()
    folders = ("src/twotower", "export", "builders", "runtime", "tools/gpu", "tests/fixtures")
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                seen.update(file.relative_to(ROOT).as_posix().encode())
                seen.update(file.read_bytes())
    return seen.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
