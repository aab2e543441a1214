"""The progress line: sizes with a rate, steps as they are, and nothing where nobody looks."""

from __future__ import annotations

import contextlib
import signal
import sys

import pytest

from twotower.cli.progress import Interrupts, ProgressLine, opening


@pytest.mark.parametrize(
    ("unit", "done", "total", "shown"),
    [
        ("bytes", 512 << 20, 2 << 30, "25 %  512 MiB of 2 GiB"),
        ("bytes", 3, 10, "30 %  3 of 10"),
        ("problems", 3, 12_000, "0 %  3/12000 problems"),
        ("bytes", 0, 0, "denoiser.engine: waiting  "),
    ],
)
def test_figures(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
    done: int,
    total: int,
    shown: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ProgressLine(unit)("denoiser.engine: waiting", done, total)
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_was_lost_is_raised_at_the_next_step(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Python drops what is raised in a finalizer; here it is an `except` that drops it."""
    monkeypatch.setattr(Interrupts, "pending", False)
    # Tests that run in the background may be deaf to Ctrl-C.
    outer = signal.signal(number, signal.default_int_handler)
    try:
        _lost_and_raised(number)
    finally:
        signal.signal(number, outer)


def _lost_and_raised(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupts():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            ProgressLine()("building", 1, 2)
    assert signal.getsignal(number) is before
    with Interrupts():
        ProgressLine()("another command", 1, 2)


def test_deafness_that_was_inherited_is_kept() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_drawn_into_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine()
    line("x", 1, 2)
    line.end()
    assert capsys.readouterr().err == ""


def test_weights_that_are_loaded_have_a_rate_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds that went into checking files are not counted as time of loading."""
    now = 100.0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("twotower.cli.progress.time.monotonic", lambda: now)
    told = opening(ProgressLine())
    told["progress"](1_000_000, 2_000_000)
    now = 150.0
    told["loading"](0, 60 << 30)
    capsys.readouterr()
    now = 160.0
    told["loading"](30 << 30, 60 << 30)
    shown = capsys.readouterr().err
    assert "loading weights   50 %  30 GiB of 60 GiB  3 GiB/s  0:10 left" in shown
