"""`make faults`: kills, broken disks and flipped bits, hundreds of each; says what did not hold.

python -m tools.faults                      everything
python -m tools.faults --only kill --verb quantize --count 10
"""

from __future__ import annotations

import argparse
import errno
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Lock

from tools.faults.bits import Place, flips
from tools.faults.control import CHANGES, Call, Fault, build_shim
from tools.faults.trials import Bench, Outcome
from tools.faults.verbs import VERBS, Verb, prepare
from tools.faults.worker import Worker

Trial = Callable[[Bench], Outcome]
ERRORS = (errno.ENOSPC, errno.EIO)
READS = 40
"""Reads that fail, a verb."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trials; returns 1 if something did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*KINDS, "bits"], action="append", help="kinds (all)")
    parser.add_argument("--verb", choices=[v.name for v in VERBS], action="append", help="(all)")
    parser.add_argument("--count", type=int, default=60, help="kills of a kind and verb (60)")
    parser.add_argument("--every", type=int, default=1, help="of failing calls, every Nth (1)")
    parser.add_argument("--flips", type=int, default=2000, help="flipped bits (2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    args = parser.parse_args(arguments)
    verbs = [v for v in VERBS if args.verb is None or v.name in args.verb]
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        benches = _benches(Path(scratch), args.workers)
        try:
            return _run(benches, verbs, args)
        finally:
            for bench in benches:
                bench.worker.close()


def _benches(scratch: Path, workers: int) -> list[Bench]:
    shim = build_shim(scratch)
    out = []
    for number in range(workers):
        folder = scratch / str(number)
        worker = Worker(folder / "worker", shim)
        if not number:
            prepare(worker, scratch / "templates")
        (folder / "trials").mkdir()
        out.append(Bench(worker, scratch / "templates", folder / "trials"))
    return out


def _run(benches: Sequence[Bench], verbs: Sequence[Verb], args: argparse.Namespace) -> int:
    wrong = 0
    for kind in args.only or (*KINDS, "bits"):
        if kind == "bits":
            wrong += _tell("bits", benches, _flips(benches, args))
            continue
        for verb in verbs:
            for bench in benches:
                bench.measure(verb)
            trials = [*KINDS[kind](benches[0], verb, args)]
            wrong += _tell(f"{kind} {verb.name}", benches, trials)
    return int(bool(wrong))


def _tell(what: str, benches: Sequence[Bench], trials: Sequence[Trial]) -> int:
    """Runs trials and prints what did not hold, like things once; returns in how many."""
    begin = time.monotonic()
    outcomes = _spread(benches, trials)
    wrong = [o for o in outcomes if o.wrong]
    well = sum(o.ended.code == 0 for o in outcomes)
    seconds = time.monotonic() - begin
    print(f"{what}: {len(outcomes)} trials, {well} ended well, {len(wrong)} wrong, {seconds:.0f} s")
    kinds: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in wrong:
        kinds.setdefault(outcome.wrong, []).append(outcome)
    for words, like in kinds.items():
        print(f"    {like[0].what}" + (f" and {len(like) - 1} more" if like[1:] else ""))
        print(*(f"        {w}" for w in words), sep="\n", flush=True)
    return len(wrong)


def _flips(benches: Sequence[Bench], args: argparse.Namespace) -> list[Trial]:
    """Random bits of a bundle with an engine."""
    places = {
        id(bench): Place(bench.worker, bench.templates / "built", bench.scratch / "bits")
        for bench in benches
    }
    chance = random.Random(args.seed)
    every = [*flips(benches[0].templates / "built", args.flips, chance)]
    return [lambda bench, flip=flip: places[id(bench)].flip(flip) for flip in every]


def _spread(benches: Sequence[Bench], trials: Sequence[Trial]) -> list[Outcome]:
    """Trials over the benches, each taking the next."""
    numbers, lock = count(), Lock()
    out: list[Outcome] = []

    def serve(bench: Bench) -> None:
        while True:
            with lock:
                number = next(numbers)
            if number >= len(trials):
                return
            out.append(trials[number](bench))

    with ThreadPoolExecutor(len(benches)) as pool:
        for future in [pool.submit(serve, bench) for bench in benches]:
            future.result()
    return out


def _kills(bench: Bench, verb: Verb, args: argparse.Namespace) -> Iterator[Trial]:
    """At random moments of its duration."""
    seconds = bench.measure(verb).seconds
    chance = random.Random(f"{args.seed} {verb.name}")
    for _ in range(args.count):
        after = chance.uniform(0, seconds)
        yield lambda bench, after=after: bench.kill(verb, after=after)


def _kills_at_writes(bench: Bench, verb: Verb, args: argparse.Namespace) -> Iterator[Trial]:
    """Before each rename and sync, and before random other calls that change the disk."""
    chance = random.Random(f"{args.seed} {verb.name}")
    for kinds in (Call.PUBLISH | Call.SYNC, CHANGES):
        calls = bench.measure(verb, Fault(Path(), kinds)).calls
        for at in sorted(chance.sample(range(1, calls + 1), min(calls, args.count // 2))):
            fault = Fault(Path(), kinds, at)
            yield lambda bench, fault=fault: bench.kill(verb, fault=fault)


def _disk(bench: Bench, verb: Verb, args: argparse.Namespace) -> Iterator[Trial]:
    """No space, from a call on; an error at one call. At every call that changes the disk."""
    calls = bench.measure(verb, Fault(Path())).calls
    for error in ERRORS:
        for at in range(1, calls + 1, args.every):
            fault = Fault(Path(), CHANGES, at, error, sticky=error == errno.ENOSPC)
            yield lambda bench, fault=fault: bench.fail(verb, fault)


def _reads(bench: Bench, verb: Verb, args: argparse.Namespace) -> Iterator[Trial]:
    """An error at one read of the sources."""
    chance = random.Random(f"{args.seed} {verb.name}")
    for name in verb.sources:
        calls = bench.measure(verb, Fault(Path(name), Call.READ)).calls
        for at in sorted(chance.sample(range(1, calls + 1), min(calls, READS))):
            fault = Fault(Path(name), Call.READ, at, errno.EIO)
            yield lambda bench, fault=fault: bench.fail(verb, fault)


KINDS = {"kill": _kills, "write": _kills_at_writes, "disk": _disk, "read": _reads}

if __name__ == "__main__":
    sys.exit(main())
