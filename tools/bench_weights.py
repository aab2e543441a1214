"""How fast weights come from a file to a device, beside `cp` of the file; `make bench-weights`.

The device is this machine's memory and a thread that copies (tools/host_device.py), so what is
measured is reading, the ring and their overlap, and not PCIe. Runs alternate, so that what else the
machine does affects all alike; the figures are medians. Before a `cold` run the file is dropped
from the page cache.
Exit code 1 if loading takes more than 1.2 times as long as `cp` to another file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from document import write_between
from host_device import HostDevice
from watched_command import wait_for_memory

from twotower.bundle import FileRecord, hash_file
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.weights.data_file import PageCache
from twotower.runtime.weights.store import LoadRequest, WeightStore
from twotower.weights.refs import WeightRef, aligned

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "out" / "bench-weights"
DOCUMENT = ROOT / "docs" / "gpu-runtime.md"
MARKS = (
    "<!-- bench-weights: written by `make bench-weights`, begin -->",
    "<!-- bench-weights: end -->",
)
WITHIN = 1.2
MEMORY = Path("/dev/shm")

COPY, COPY_MEMORY = "`cp` to another file", "`cp` to a file in memory"
LOAD, LOAD_NEW, LOAD_HASHED = "load", "load, into new memory", "load, hashed"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=SCRATCH, metavar="DIR")
    parser.add_argument("--gigabytes", type=float, default=4.3, metavar="N", help="of the file")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each kind")
    parser.add_argument("--write-docs", type=Path, nargs="?", const=DOCUMENT, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    args.scratch.mkdir(parents=True, exist_ok=True)
    file = args.scratch / "model.onnx.data"
    try:
        weights = write_file(file, round(args.gigabytes * 1e9))
        bench = Bench(file, weights)
        seconds = bench.measure(args.runs)
    finally:
        file.unlink(missing_ok=True)
    size = max(w.end for w in weights.values())
    text = table(seconds, size=size, peak=bench.peak)
    facts = {"bytes": size, "seconds": seconds, "peak_anonymous": bench.peak}
    print(json.dumps(facts) if args.json else text)
    if args.write_docs:
        write_between(args.write_docs, MARKS, text)
    medians = {name: statistics.median(some) for name, some in seconds.items()}
    slow = [f"{c}: {r:.2f} times `cp`" for c, r in ratios(medians).items() if r > WITHIN]
    print("\n".join(slow), file=sys.stderr)
    return 1 if slow else 0


def write_file(file: Path, size: int) -> dict[str, WeightRef]:
    """A data file like that of an expert layer: two large weights, and small ones between."""
    large = (size - (1 << 20)) // 2
    weights: dict[str, WeightRef] = {}
    end = 0
    for number, nbytes in enumerate((2688 * 4, 128 * 4, large, 128 * 2688 * 2, 5376, large)):
        weights[f"w{number}"] = WeightRef("int8", (nbytes,), aligned(end, nbytes))
        end = weights[f"w{number}"].end
    block = random.Random(0).randbytes(64 << 20)
    with file.open("wb") as opened:
        for start in range(0, end, len(block)):
            opened.write(block[: end - start])
        opened.flush()
        os.fsync(opened.fileno())
    return weights


class Bench:
    """Runs of every kind on one file.

    Args:
        file: The data file.
        weights: Its weights.
    """

    def __init__(self, file: Path, weights: dict[str, WeightRef]) -> None:
        self._file = file
        record = FileRecord(file.stat().st_size, hash_file(file))
        self._request = LoadRequest(file, record, weights, 0)
        self._kept = HostDevice(1 << 45)
        self.peak = 0
        """Most anonymous memory seen while loading, in bytes above what there was before."""

    def measure(self, runs: int) -> dict[str, list[float]]:
        """Seconds of every run, by `page cache: kind`; the first of a kind is not counted."""
        kinds: dict[str, Callable[[], None]] = {
            COPY: lambda: self._copy(self._file.with_suffix(".copy")),
            COPY_MEMORY: lambda: self._copy(MEMORY / f"twotower-bench-{os.getpid()}"),
            LOAD: lambda: self._load(self._kept),
            LOAD_HASHED: lambda: self._load(self._kept, hashed=True),
            LOAD_NEW: lambda: self._load(HostDevice(1 << 45, fresh=True)),
        }
        seconds: dict[str, list[float]] = {}
        for cache, some in (("warm", tuple(kinds)), ("cold", (COPY, LOAD))):
            for run in range(runs + 1):
                for kind in some:
                    self._prepare(cold=cache == "cold")
                    began = time.perf_counter()
                    kinds[kind]()
                    taken = time.perf_counter() - began
                    self._remove_copies()
                    _say(f"{cache}: {kind}: {taken:.2f} s")
                    if run:
                        seconds.setdefault(f"{cache}: {kind}", []).append(taken)
        return seconds

    def _copy(self, target: Path) -> None:
        subprocess.run(["cp", str(self._file), str(target)], check=True)

    def _load(self, device: HostDevice, *, hashed: bool = False) -> None:
        before = _anonymous()

        def tick(done: int, total: int) -> None:
            self.peak = max(self.peak, _anonymous() - before)

        store = WeightStore(Cuda(device))
        try:
            store.load([self._request], hashed=hashed, progress=tick)
        finally:
            store.close()

    def _prepare(self, *, cold: bool) -> None:
        """Lets earlier writes end, and puts the file into the page cache or out of it."""
        os.sync()
        wait_for_memory(round(2.5 * self._request.record.size), say=_say)
        handle = os.open(self._file, os.O_RDONLY)
        cache = PageCache(handle, self._request.record.size)
        if cold:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            hash_file(self._file)
        share = cache.share(0, self._request.record.size)
        cache.close()
        os.close(handle)
        if share > 0.05 if cold else share < 0.95:
            raise SystemExit(f"the page cache holds {share:.0%} of the file: too little memory?")

    def _remove_copies(self) -> None:
        for file in (self._file.with_suffix(".copy"), MEMORY / f"twotower-bench-{os.getpid()}"):
            file.unlink(missing_ok=True)


def ratios(medians: Mapping[str, float]) -> dict[str, float]:
    """How many times as long as `cp` to another file loading takes, by page cache."""
    return {c: medians[f"{c}: {LOAD}"] / medians[f"{c}: {COPY}"] for c in ("warm", "cold")}


def table(seconds: Mapping[str, Sequence[float]], *, size: int, peak: int) -> str:
    """The medians as Markdown, with what they were measured on."""
    lines = ["| page cache | | seconds | GB/s | least, most |", "| --- | --- | --- | --- | --- |"]
    for name, some in seconds.items():
        cache, kind = name.split(": ")
        median = statistics.median(some)
        ends = f"{min(some):.2f}, {max(some):.2f} s"
        lines.append(f"| {cache} | {kind} | {median:.2f} | {size / median / 1e9:.2f} | {ends} |")
    runs = len(next(iter(seconds.values())))
    where = f"{os.cpu_count()} CPUs, no GPU"
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {runs} alternating runs, {size / 1e9:.2f} GB, {where}, load average "
            f"{os.getloadavg()[1]:.1f}, {datetime.now(UTC).date()}. Anonymous memory grew by "
            f"{peak / 1e6:.0f} MB at most while loading.",
        ]
    )


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
