"""Half precision against float32, token by token, on the small trained model and its suite; `make fp16-check` runs this.

The float16 graph is computed with every result rounded to float16, which no CPU library does by itself (see twotower.evaluate.rounding).
Exit code 1 if fewer than 99 % of the prompts get the same tokens, in diffusion or in autoregressive mode.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from twotower import TwoTower
from twotower.builders import build_engines, builder_for
from twotower.evaluate.agreement import measure_agreement
from twotower.evaluate.rounding import RoundingBuilder
from twotower.evaluate.suite import load_suite
from twotower.export import Checkpoint, ExportConfig, export_bundle

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", default=str(ROOT / "assets" / "twotower-tiny"), metavar="FOLDER")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--limit", type=int, metavar="N", help="only N prompts of each kind")
    parser.add_argument("--at-least", type=float, default=99.0, metavar="P", help="percent of the prompts that must agree (%(default)s)")
    args = parser.parse_args()
    suite = load_suite().only(limit=args.limit)
    checkpoint = Checkpoint.open(Path(args.checkpoint))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="twotower-fp16-") as scratch:
        wide = export_bundle(checkpoint, Path(scratch) / "float32", ExportConfig(dtype="float32"))
        narrow = export_bundle(checkpoint, Path(scratch) / args.dtype, ExportConfig(dtype=args.dtype))
        build_engines(wide, "ort-cpu", builder_for("ort-cpu"))
        record = build_engines(narrow, "ort-cpu", RoundingBuilder())
        count = {name: sum(operators.values()) for name, operators in record.report["rounded"].items()}
        print(f"{args.dtype}: results rounded in each graph: {', '.join(f'{name} {n}' for name, n in count.items())}")
        with TwoTower.open(wide.path, target="ort-cpu") as reference, TwoTower.open(narrow.path, target="ort-cpu") as rounded:
            results = measure_agreement(reference, rounded, suite.problems)
    for r in results:
        where = ", ".join(f"{p.problem} at token {p.token}" for p in r.partings) or "nowhere"
        print(f"{r.mode:<10} same tokens on {r.prompts - len(r.partings)} of {r.prompts} prompts ({r.percent:.2f} %); they part: {where}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 0 if all(r.percent >= args.at_least for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
