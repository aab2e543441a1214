"""A generation as it is written: on a terminal the current block redrawn in place, elsewhere one line a pass."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from twotower.trace import TraceStep

__all__ = ["LiveView", "Words", "pass_line", "visible"]

_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
_NEW, _TRIED = "\x1b[30;46m", "\x1b[2;3m"  # black on cyan, and faint italics
_NAMED = {"\n": "\u23ce", "\t": "\u21e5"}
_WIDE = ("W", "F")


def visible(piece: str) -> str:
    """A token's text without anything that would move the cursor: a model can write any character, escape codes included."""
    return "".join(c if c.isprintable() else _NAMED.get(c, "\ufffd") for c in piece)


def pass_line(step: TraceStep, words: Words) -> str:
    """One pass as a line: where, how many positions were filled, the least sure of them, and the block."""
    sure = [step.confidence[p] for p in step.committed]
    lowest = f"{min(sure):.3f}" if sure else "-"
    return f"{step.block:5d}  {step.step:4d}  {len(step.committed):9d}  {lowest:>6}  {step.denoise_ms:8.2f}  {words.block(step)}"


class Words:
    """How tokens are shown."""

    def __init__(self, piece: Callable[[int], str], mask: int, *, numbers: bool) -> None:
        self._piece, self._mask, self._numbers = piece, mask, numbers

    def one(self, token: int) -> str:
        """One token."""
        return visible(self._piece(token))

    def block(self, step: TraceStep) -> str:
        """The block after a pass, with a low line for every mask."""
        return (" " if self._numbers else "").join(
            "_" if t == self._mask else self.one(t) for t in step.next
        )

    def cells(self, step: TraceStep) -> list[tuple[str, str]]:
        """(text, style) of every position after a pass; a masked one shows what was predicted and not taken."""
        out = []
        for position, token in enumerate(step.next):
            if token == self._mask:
                out.append((self.one(step.predicted[position]), _TRIED))
            else:
                out.append((self.one(token), _NEW if position in step.committed else ""))
        return out


class LiveView:
    """Call it with every pass, then `end` it.

    Args:
        words: How tokens are shown.
        stream: Where to draw; stdout by default.
    """

    HEAD = "block  step  committed  lowest        ms  text (a low line is a mask)"

    def __init__(self, words: Words, stream: TextIO | None = None) -> None:
        self._words, self._stream = words, stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._drawn = 0  # lines that the next drawing replaces
        self._passes = self._tokens = 0
        self._last: TraceStep | None = None
        if not self._terminal:
            self._write(self.HEAD + "\n")

    def __call__(self, step: TraceStep) -> None:
        self._passes += 1
        self._tokens += len(step.committed)
        if not self._terminal:
            self._write(pass_line(step, self._words) + "\n")
            return
        self._erase()
        if self._last is not None and self._last.block != step.block:
            self._write(self._settled(self._last) + "\n")
        lines = [self._status(step), *self._wrapped(step)]
        self._write("\n".join(lines) + "\n")
        self._drawn, self._last = len(lines), step

    def end(self) -> None:
        """Leaves the last block as text."""
        if self._terminal and self._last is not None:
            self._erase()
            self._write(self._settled(self._last) + "\n")
            self._last = None

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\x1b[{self._drawn}F\x1b[J")
        self._drawn = 0

    def _status(self, step: TraceStep) -> str:
        text = (
            f"block {step.block}  step {step.step}  {step.t:.0%} masked before  {step.denoise_ms:.1f} ms  {len(step.committed)} committed"
            f"  {self._tokens / self._passes:.2f} tokens a pass"
        )
        return f"{_BOLD}{text[: _columns()]}{_RESET}"

    def _settled(self, step: TraceStep) -> str:
        head = f"block {step.block:3d}  {step.step + 1:2d} passes  "
        return f"{_DIM}{head}{_RESET}{_cut(self._words.block(step), _columns() - len(head))}"

    def _wrapped(self, step: TraceStep) -> list[str]:
        """The cells in lines no wider than the terminal: a line that wrapped by itself could not be drawn over."""
        lines, used, width = [""], 0, _columns()
        for text, style in self._words.cells(step):
            shown = _cut(text, width - 3)
            needed = _width(shown) + 3
            if used + needed > width and used:
                lines.append("")
                used = 0
            lines[-1] += f"{style} {shown} {_RESET} "
            used += needed
        return lines

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _columns() -> int:
    return max(shutil.get_terminal_size().columns - 1, 20)


def _width(text: str) -> int:
    """Columns that a text takes: East Asian characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in _WIDE else 1
        for c in text
    )


def _cut(text: str, columns: int) -> str:
    while text and _width(text) > columns:
        text = text[:-1]
    return text
