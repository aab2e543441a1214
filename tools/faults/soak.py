"""`make soak`: thousands of requests from many threads; memory stays, and every text is right.

    python -m tools.faults.soak                 10,000 requests from 8 threads
    python -m tools.faults.soak --count 500

Requests are of every mode, greedy and sampled, of several lengths; some are streams read to their
end, some are streams that are left, some are cancelled. A right text is what the same request gives
when it is the only one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from twotower import GenerationConfig, TwoTower
from twotower.cli.main import main as run_command
from twotower.errors import RequestCancelledError
from twotower.evaluate.suite import load_suite
from twotower.units import format_bytes

TRAINED = Path(__file__).resolve().parents[2] / "assets" / "twotower-tiny"
PROMPTS = 24
THREADS = 8
WARM = 500
"""Requests before memory is watched: arenas, caches and batches of every size have been seen."""

GROWTH = 2**20
"""Bytes that the slope may stand for over 10,000 requests, at the lower end of its interval."""


@dataclass(frozen=True)
class Kind:
    """What is asked for: all of a kind of a prompt give one text."""

    name: str
    config: GenerationConfig


KINDS = (
    Kind("diffusion", GenerationConfig(max_new_tokens=24, confidence_threshold=0.8)),
    Kind("diffusion, one pass", GenerationConfig(max_new_tokens=8, steps_per_block=1)),
    Kind("ar", GenerationConfig(max_new_tokens=12, mode="ar")),
    Kind("sampled", GenerationConfig(max_new_tokens=20, temperature=0.8, seed=7)),
    Kind("sampled ar", GenerationConfig(max_new_tokens=10, mode="ar", temperature=1.0, seed=9)),
)
WAYS = ("generate", "batch", "stream", "left", "cancelled")


@dataclass
class Soak:
    """A session, what is right, and what was seen."""

    model: TwoTower
    prompts: Sequence[str]
    right: dict[tuple[str, str], str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self) -> None:
        """Every request by itself."""
        for kind in KINDS:
            for prompt in self.prompts:
                self.right[kind.name, prompt] = self.model.generate(prompt, kind.config).text

    def request(self, number: int) -> None:
        """One request, drawn by its number; notes a wrong text or an error."""
        chance = random.Random(number)
        kind, prompt = chance.choice(KINDS), chance.choice(self.prompts)
        way = chance.choices(WAYS, (6, 1, 2, 1, 1))[0]
        try:
            texts = self._texts(way, kind, prompt, chance)
        except Exception as e:  # noqa: BLE001 - it is told, and the run goes on
            texts = {}
            self._note(f"request {number}, {way}, {kind.name}: {type(e).__name__}: {e}")
        for asked, text in texts.items():
            right = self.right[kind.name, asked]
            same = text == right or (way == "left" and right.startswith(text))
            if not same:
                self._note(f"request {number}, {way}, {kind.name}: {text!r}, not {right!r}")
        with self._lock:
            self.done[way] += 1

    def _texts(self, way: str, kind: Kind, prompt: str, chance: random.Random) -> dict[str, str]:
        """Texts by prompt."""
        if way == "generate":
            return {prompt: self.model.generate(prompt, kind.config).text}
        if way == "batch":
            asked = chance.sample(self.prompts, 4)
            results = self.model.generate(asked, kind.config)
            return {p: r.text for p, r in zip(asked, results, strict=True)}
        if way == "cancelled":
            passes = iter(range(chance.randrange(1, 4)))
            with contextlib.suppress(RequestCancelledError):
                self.model.generate(
                    prompt, kind.config, cancelled=lambda: next(passes, None) is None
                )
            return {}
        text = ""
        for event in self.model.stream(prompt, kind.config):
            text += event.text
            if way == "left":
                break
        return {prompt: text}

    def _note(self, words: str) -> None:
        with self._lock:
            self.wrong.append(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; returns 1 if a text was wrong or memory grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="requests (10000)")
    args = parser.parse_args(arguments)
    every = load_suite(None).problems
    problems = every[:: max(1, len(every) // PROMPTS)][:PROMPTS]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        bundle = Path(scratch) / "bundle"
        for words in (
            ("export", str(TRAINED), "--no-verify", "-o", str(bundle)),
            ("build", str(bundle)),
        ):
            if code := run_command(words):
                return code
        with TwoTower.open(bundle, threads=1) as model:
            soak = Soak(model, [p.prompt for p in problems])
            soak.learn()
            memory = _served(soak, args.count)
    slope, half = slope_of(memory)
    print(json.dumps(dict(soak.done)), f"in {time.monotonic() - begin:.0f} s")
    print(
        f"memory {format_bytes(memory[-1][1])}, by 10,000 requests {_signed(slope)} "
        f"[{_signed(slope - half)}, {_signed(slope + half)}]"
    )
    print(*soak.wrong[:20], f"{len(soak.wrong)} wrong", sep="\n")
    return int(bool(soak.wrong) or slope - half > GROWTH)


def _served(soak: Soak, count: int) -> list[tuple[int, int]]:
    """(requests so far, resident bytes) every 50 requests after the first ones."""
    memory: list[tuple[int, int]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for number, _ in enumerate(pool.map(soak.request, range(count)), 1):
            if number >= WARM and not number % 50:
                memory.append((number, _resident()))
    return memory


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def slope_of(memory: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Bytes by 10,000 requests, least squares, and half of its 95 % interval.

    Neighbouring samples are not independent: the interval is that of means of ten runs of samples.
    """
    size = max(1, len(memory) // 10)
    means = [
        (statistics.mean(n for n, _ in part), statistics.mean(b for _, b in part))
        for part in (memory[i : i + size] for i in range(0, len(memory), size))
    ]
    x, y = zip(*means, strict=True)
    line = statistics.linear_regression(x, y)
    rest = [b - line.slope * n - line.intercept for n, b in means]
    spread = sum((n - statistics.mean(x)) ** 2 for n in x)
    error = math.sqrt(sum(r * r for r in rest) / max(1, len(means) - 2) / spread)
    return line.slope * 10_000, 2.3 * error * 10_000


def _signed(count: float) -> str:
    return ("-" if count < 0 else "+") + format_bytes(abs(count))


if __name__ == "__main__":
    sys.exit(main())
