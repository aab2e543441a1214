"""Writes the prompts the small model is calibrated on, none of which is in the suite.

python tools/tiny/prompts.py --output assets/twotower-tiny-prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from recipe import RECIPE
from tasks import draw

EACH = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    lines = []
    for kind in sorted(RECIPE.kinds):
        rng = random.Random(f"calibration {kind}")
        lines += [
            json.dumps({"text": draw(rng, held_out=False, kind=kind).prompt}) for _ in range(EACH)
        ]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
