"""The page of a device from the results of one or several runs on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.gpu.first_hour import PAGES
from twotower.doctor import merge_results, read_results, write_page
from twotower.errors import TwoTowerError

__all__ = ["main"]

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make gpu-page", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", metavar="RESULTS", help="results.json of a run"
    )
    parser.add_argument("--pages", type=Path, default=PAGES, metavar="FOLDER", help="(docs/gpu)")
    args = parser.parse_args(argv)
    try:
        page = write_page(args.pages, merge_results(map(read_results, args.results)))
    except TwoTowerError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
