"""One function in a process of its own: how long it took, and how much memory was its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower.errors import BuildError

__all__ = ["run_measured"]

_EVERY = 0.01


def run_measured(work: Callable[..., None], *arguments: Any) -> tuple[float, int]:
    """Runs `work(*arguments)` in a fresh process.

    Returns:
        Seconds from the process's start to its end, and the peak of its anonymous memory in bytes: sampled every 10 ms,
        without the file pages that the system can drop; 0 where /proc does not tell.

    Raises:
        BuildError: the process failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    began = time.perf_counter()
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, _anonymous(process.pid or 0))
        process.join(_EVERY)
    seconds = time.perf_counter() - began
    if process.exitcode:
        raise BuildError("a measured process failed", found=f"exit code {process.exitcode}", do="read its message above")
    return seconds, peak


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
