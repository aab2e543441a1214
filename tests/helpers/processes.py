"""Processes of this interpreter, and the one that compiles an engine, watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.source import ROOT

__all__ = ["child_of", "environment", "is_gone", "run_python"]


def environment() -> dict[str, str]:
    """Of this process, with all that it imports from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def run_python(
    *words: str, check: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter with the checkout's package, and with more environment variables."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        text=True,
        check=check,
    )


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
