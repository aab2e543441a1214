"""Writes the suite of the package: held-out problems of every kind.

python tools/tiny/suite.py --output src/twotower/evaluate/data/suite.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from recipe import RECIPE
from tasks import draw

INSIDE, BEYOND = (
    96,
    4,
)  # problems of each kind; beyond trained lengths both modes mostly fail, which says little about either
FEWER = {
    "sort": (23, 1)
}  # the kind that suits diffusion least: enough to see it lose, not enough to be most of what is lost
FIXED_LENGTH = {"letter"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    lines = []
    for kind in sorted(RECIPE.kinds):
        rng, seen, number = random.Random(f"suite {kind}"), set(), 0
        inside, outside = FEWER.get(kind, (INSIDE, BEYOND))
        while number < inside + outside:
            beyond = number >= inside and kind not in FIXED_LENGTH
            problem = draw(rng, held_out=True, kind=kind, beyond=beyond)
            if problem.prompt in seen:
                continue
            seen.add(problem.prompt)
            number += 1
            facts = {
                "id": f"{kind}-{number:03d}",
                "kind": kind,
                "length": "out" if beyond else "in",
            }
            lines.append(json.dumps({**facts, "prompt": problem.prompt, "answer": problem.answer}))
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(lines)} problems")


if __name__ == "__main__":
    main()
