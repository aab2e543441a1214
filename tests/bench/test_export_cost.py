"""Time and memory of a function in a process of its own."""

from __future__ import annotations

import sys
import time

import pytest

from twotower.bench.export_cost import run_measured
from twotower.errors import BuildError


def hold(mebibytes: int, seconds: float) -> None:
    kept = b"\x01" * (mebibytes << 20)
    time.sleep(seconds)
    assert len(kept) == mebibytes << 20


def fail(code: int) -> None:
    sys.exit(code)


@pytest.mark.slow
def test_what_a_process_holds_is_seen() -> None:
    seconds, idle = run_measured(hold, 0, 0.1)
    assert seconds >= 0.1
    _, held = run_measured(hold, 256, 0.3)
    assert held - idle > 200 << 20


def test_a_failure_is_an_error_and_not_a_number() -> None:
    with pytest.raises(BuildError, match="measured process failed") as caught:
        run_measured(fail, 3)
    assert "3" in caught.value.found
