"""The process that compiles an engine, watched from outside by what Linux tells of it."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["child_of", "is_gone"]


def child_of(pid: int) -> int:
    """The process that compiles; it is waited for."""
    for _ in range(600):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if text and "twotower.builders.trt.child" in Path(f"/proc/{text[0]}/cmdline").read_text():
            return int(text[0])
        time.sleep(0.02)
    raise AssertionError("no build started")


def is_gone(pid: int) -> bool:
    """Within some seconds; a zombie that nobody waited for is gone too."""
    for _ in range(250):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
