"""A command run as a user types it, with its cost and the load of the machine."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ran", "run_watched", "wait_for_memory"]


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command took.

    Attributes:
        code: Its exit status.
        seconds: Of the clock.
        cpu_seconds: Of the processors, its children included.
        peak_memory: Most bytes the process itself had in memory; its children report their own.
        others: Share of the processors' time that other programs used meanwhile, 0 to 1.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peak_memory: int
    others: float


def run_watched(command: Sequence[str], *, cwd: Path | None = None) -> Ran:
    """Runs a command; its output goes where this process's goes."""
    began, before = time.perf_counter(), _busy_seconds()
    child = subprocess.Popen(command, cwd=cwd)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], _peak_memory(child.pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.kill()
        child.wait()
        raise
    finally:
        done.set()
        thread.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    others = max(_busy_seconds() - before - cpu, 0.0) / (seconds * (os.cpu_count() or 1))
    return Ran(child.returncode, seconds, cpu, peak[0], others)


def wait_for_memory(needed: int, *, say: Callable[[str], None], seconds: float = 600) -> None:
    """Waits until the machine has so much memory available, for other programs may be at work."""
    began = time.monotonic()
    while _available() < needed and time.monotonic() - began < seconds:
        say(f"waiting for {needed / 1e9:.0f} GB of memory")
        time.sleep(5)


def _busy_seconds() -> float:
    """Processor time of all programs since the machine started."""
    words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq = map(int, words[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _peak_memory(pid: int) -> int:
    """Most bytes a process had in memory so far; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
