"""A progress line on stderr, silent unless that is a terminal, and interrupts that end the work."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Any, Self

from twotower.units import format_bytes

_FEWEST_BYTES = 10_000


class Interrupts:
    """SIGINT and SIGTERM as `KeyboardInterrupt`, for the length of a `with` statement.

    Python drops an exception raised while it runs a finalizer, and an interrupt there would be
    lost; so it is remembered and raised again at the next step of progress. If SIGINT was ignored
    at start-up, as in a background job of a shell, it stays ignored.
    """

    pending = False

    def __enter__(self) -> None:
        Interrupts.pending = False
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        self._before = {number: signal.signal(number, _interrupt) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    Interrupts.pending = True
    raise KeyboardInterrupt


class ProgressLine:
    """Call it with (what, done, total); it redraws one line at most ten times a second.

    At the end of a `with` statement the line is cleared.
    Unit `bytes` shows sizes and a rate, anything else a counted noun. Totals too small for a line
    as bytes are steps of a build or an export and are shown as they are.
    """

    def __init__(self, unit: str = "bytes") -> None:
        self._unit = unit
        self._shown = 0.0
        self._what = ""
        self._started = time.monotonic()
        self._active = sys.stderr.isatty()

    def __call__(self, what: str, done: int, total: int) -> None:
        if Interrupts.pending:
            raise KeyboardInterrupt
        if not self._active:
            return
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._shown = what, now, 0.0
        if now - self._shown < 0.1 and done < total:
            return
        self._shown = now
        sys.stderr.write(f"\r\x1b[K{what}  {self._figures(done, total, now - self._started)}")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Clears the line."""
        if self._active and self._what:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _figures(self, done: int, total: int, seconds: float) -> str:
        if total <= 0:
            return ""
        share = f"{100 * done / total:3.0f} %"
        if self._unit != "bytes":
            return f"{share}  {done}/{total} {self._unit}"
        if total < _FEWEST_BYTES:
            return f"{share}  {done} of {total}"
        rate = done / seconds if seconds > 0.2 else 0.0
        figures = f"{share}  {format_bytes(done)} of {format_bytes(total)}"
        if not rate:
            return figures
        minutes, rest = divmod(round((total - done) / rate), 60)
        return f"{figures}  {format_bytes(rate)}/s  {minutes}:{rest:02d} left"


def opening(line: ProgressLine) -> dict[str, Any]:
    """What `TwoTower.open` reports, on a line: files being checked, then weights being loaded."""
    return {
        "progress": lambda done, total: line("checking the bundle", done, total),
        "loading": lambda done, total: line("loading weights", done, total),
    }
