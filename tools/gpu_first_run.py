"""What a machine with a GPU can tell in its first ten minutes: one question after another, the most valuable first.

Every question runs in a process of its own with a time limit, so that a crash or a hang of one costs only its own answer. Answers are
appended to `answers.jsonl` as they come, and `README.md` beside it is written anew after each. `make gpu-first-run` runs this.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_questions import LIMIT, QUESTIONS

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="out/gpu-first-run", metavar="FOLDER", help="where answers and scratch files go (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="start no question after this long (%(default)s)")
    parser.add_argument("--only", metavar="A,B", help=f"of the questions: {', '.join(QUESTIONS)}")
    parser.add_argument("--answer", choices=tuple(QUESTIONS), help=argparse.SUPPRESS)  # how the script calls itself
    args = parser.parse_args()
    output = Path(args.output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    if args.answer:
        _, ask = QUESTIONS[args.answer]
        print("\n" + json.dumps(ask(output)))
        return 0
    names = [n for n in QUESTIONS if not args.only or n in args.only.split(",")]
    end = time.monotonic() + 60 * args.minutes
    answers: list[dict[str, Any]] = []
    for name in names:
        answer = _asked(name, output, min(LIMIT.get(name, 120), end - time.monotonic()))
        answers.append(answer)
        with (output / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")
        (output / "README.md").write_text(_page(answers), encoding="utf-8")
        print(f"{answer['outcome']:<9} {name}: {answer['seconds']:.0f} s  {json.dumps(answer['facts'])[:300]}", flush=True)
    shutil.rmtree(output / "scratch", ignore_errors=True)
    print(f"wrote {output / 'README.md'}")
    return 0 if all(a["outcome"] in ("answered", "not asked") for a in answers) else 1


def _asked(name: str, output: Path, limit: float) -> dict[str, Any]:
    """One question, put to a process of its own."""
    question, _ = QUESTIONS[name]
    out: dict[str, Any] = {"name": name, "question": question, "outcome": "not asked", "seconds": 0.0, "facts": {}, "log": ""}
    if limit < 5:
        return out
    started = time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--output", str(output), "--answer", name]
    with (output / f"{name}.log").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            code: int | None = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, cwd=ROOT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        text = log.read()
    out["seconds"] = round(time.monotonic() - started, 1)
    lines = text.strip().splitlines()
    if code == 0:
        out |= {"outcome": "answered", "facts": json.loads(lines[-1])}
    else:
        how = f"no answer in {limit:.0f} s" if code is None else f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        out |= {"outcome": "failed", "facts": {"how": how}, "log": "\n".join(lines[-15:])}
    return out


def _page(answers: list[dict[str, Any]]) -> str:
    lines = [
        "# First run on a GPU",
        "",
        "Written by tools/gpu_first_run.py; all numbers are in answers.jsonl, all output in the .log files.",
        "",
    ]
    for a in answers:
        lines += [
            f"## {a['question']}",
            "",
            f"{a['outcome']}, {a['seconds']:.0f} s",
            "",
            "```json",
            json.dumps(a["facts"], indent=1),
            "```",
            "",
        ]
        if a["log"]:
            lines += ["```text", a["log"], "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
