"""`twotower build`: the engines of one target, from a bundle's graphs."""

from __future__ import annotations

import argparse
import json
import sys

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder made by `twotower export`")
    parser.add_argument("--target", default="ort-cpu", metavar="T", help="what to build for (default: ort-cpu, which runs on any machine)")
    parser.add_argument("--force", action="store_true", help="build again although a fitting engine is there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built and what it takes, then stop")
    parser.add_argument("--json", action="store_true", help="print the build record as one JSON object on stdout")
    parser.epilog = (
        "The result lies in BUNDLE/engines/<target>. A fitting engine is kept; a killed build leaves the old one.\n"
        "example: twotower build bundle --target ort-cpu"
    )


def run(args: argparse.Namespace) -> int:
    from twotower.builders import BuildConfig, build_engines, builder_for
    from twotower.bundle import Bundle
    from twotower.cli.progress import ProgressLine, human_bytes

    builder = builder_for(args.target)
    line = ProgressLine()
    try:
        bundle = Bundle.open(args.bundle, progress=lambda done, total: line("checking the bundle", done, total))
        config = BuildConfig(force=args.force)
        if args.dry_run:
            library = builder.library()
            print(f"{args.target}: {library['name']} {library['version']}, {human_bytes(builder.needed_bytes(bundle, config))} of disk")
            print("\n".join(builder.describe(bundle, config)))
            return 0
        record = build_engines(bundle, args.target, builder, config=config, report=line)
    finally:
        line.end()
    if args.json:
        print(json.dumps(record.to_json()))
    size = sum(file.size for file in record.files.values())
    made = f"built in {record.report.get('seconds')} s with {record.library['name']} {record.library['version']}"
    print(f"{args.bundle}/engines/{args.target}: {human_bytes(size)}, {made}", file=sys.stderr)
    return 0
