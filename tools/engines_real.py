"""Engines at published widths, built without a GPU: seconds, memory and size of each; `make engines-real` runs this.

Slices of one layer of each kind and of the heads, and three layers in segments under a memory bound, all in bfloat16 for SM 89 and 120.
Rows are kept as they come (OUT/results.jsonl), and a slice that is there, built with the same library, is not built again. Exit code 1 if a
warning is unexplained, if a build needed more than its bound, or if what `twotower plan` says of a large engine is more than 20 % off.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from document import write_between, write_whole
from engines_slices import SLICES, Slice, measure, read_rows, wait_for_memory

from twotower.builders import builder_for

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "engines.md"
BEGIN, END = "<!-- engines-real: written by `make engines-real`, begin -->", "<!-- engines-real: end -->"
PLANNED_WITHIN = 0.2
PLANNED_FROM = 500_000_000
"""Engines of so many bytes of weights are held against `twotower plan` one by one; seconds in all only: those of one are half chance."""


def main(argv: list[str] | None = None, slices: tuple[Slice, ...] = SLICES) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "engines-real", metavar="OUT", help="where rows and scratch files go")
    parser.add_argument("--only", metavar="A,B", help="only these slices")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--write-docs", type=Path, nargs="?", const=DOCUMENT, metavar="FILE", help="put the table into docs/engines.md")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    wanted = args.only.split(",") if args.only else [s.name for s in slices]
    rows, version = read_rows(file), builder_for("rtx").library()["version"]
    for piece in slices:
        there = any(row["slice"] == piece.name and row["library"] == version for row in rows)
        if piece.name in wanted and (args.force or not there):
            if not piece.changes:  # of published widths
                wait_for_memory(14_000_000_000, say=_say)
            made = measure(piece, args.output, say=_say)
            rows = [*(row for row in rows if row["slice"] != piece.name), *made]
            write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    order = [piece.name for piece in slices]
    rows = sorted((row for row in rows if row["slice"] in order), key=lambda row: order.index(row["slice"]))
    print(table(rows))
    if args.write_docs:
        write_table(args.write_docs, table(rows))
    problems = [*(problem for row in rows for problem in problems_of(row)), *seconds_off(rows)]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def problems_of(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row."""
    where = f"{row['slice']} {row['engine']}"
    out = [f"{where}: unexplained warning: {message}" for message in row["unexplained"]]
    if row["bound"] and row["peak"] > row["bound"]:
        out.append(f"{where}: {row['peak'] / 1e9:.2f} GB needed, {row['bound'] / 1e9:.2f} GB allowed")
    for what in ("peak", "size") if row["weights"] >= PLANNED_FROM else ():
        planned, measured = row["planned"][what], row[what]
        low = 0 if what == "peak" else -PLANNED_WITHIN  # a memory bound holds only if no build needs more than planned
        if not low <= planned / measured - 1 <= PLANNED_WITHIN:
            out.append(f"{where}: {what} planned {planned:.4g}, measured {measured:.4g}")
    return out


def seconds_off(rows: list[dict[str, Any]]) -> list[str]:
    """Whether all large engines together took the time that was planned."""
    large = [row for row in rows if row["weights"] >= PLANNED_FROM]
    planned, measured = sum(row["planned"]["seconds"] for row in large), sum(row["seconds"] for row in large)
    off = large and abs(planned / measured - 1) > PLANNED_WITHIN
    return [f"all engines: {planned:.0f} s planned, {measured:.0f} s measured"] if off else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = [
        "slice",
        "engine",
        "bound",
        "weights",
        "parse s",
        "seconds",
        "planned",
        "peak memory",
        "planned",
        "anonymous",
        "size",
        "planned",
        "layers",
    ]
    lines = [head, ["---"] * len(head), *(_cells(row) for row in rows)]
    planned, measured = (sum(values) for values in ((r["planned"]["seconds"] for r in rows), (r["seconds"] for r in rows)))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\nAll together: {measured:.0f} s, planned {planned:.0f} s."


def _cells(row: dict[str, Any]) -> list[str]:
    planned = row["planned"]
    return [
        f"`{row['slice']}`",
        row["engine"].removesuffix(".engine"),
        f"{row['bound'] / 1e9:g} GB" if row["bound"] else "",
        f"{row['weights'] / 1e9:.3f} GB",
        f"{row['parse_seconds']:.2f}",
        f"{row['seconds']:.1f}",
        f"{planned['seconds']:.1f}",
        f"{row['peak'] / 1e9:.2f} GB",
        f"{planned['peak'] / 1e9:.2f} GB",
        f"{row['anonymous'] / 1e9:.2f} GB",
        f"{row['size'] / 1e9:.3f} GB",
        f"{planned['size'] / 1e9:.3f} GB",
        str(row["layers"]),
    ]


def write_table(document: Path, text: str) -> None:
    """Puts a table between the document's two marks."""
    write_between(document, (BEGIN, END), text)


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
