"""Traces on a terminal: redrawn in place, a line a pass where it is none, and comparisons."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TextIO

from twotower.trace.diff import TraceDiff
from twotower.trace.record import Trace, TraceStep

_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
_NEW, _TRIED = "\x1b[30;46m", "\x1b[2;3m"  # black on cyan, and faint italics
_NAMED = {"\n": "\u23ce", "\t": "\u21e5"}
_WIDE = ("W", "F")
_HEAD = "block  step  committed  lowest        ms  text (a low line is a mask)"


def visible(piece: str) -> str:
    """A token's text without what would move the cursor; a model can write escape codes, too."""
    return "".join(c if c.isprintable() else _NAMED.get(c, "\ufffd") for c in piece)


class Words:
    """How tokens are shown; `mask` is the id of an unwritten position.

    `numbers`: pieces are token ids, which need spaces between them.
    """

    def __init__(self, piece: Callable[[int], str], mask: int, *, numbers: bool) -> None:
        self._piece, self._mask, self._numbers = piece, mask, numbers

    @classmethod
    def of(cls, trace: Trace) -> Words:
        return cls(trace.piece, trace.header.mask_token_id, numbers=not trace.has_text)

    def block(self, step: TraceStep) -> str:
        """The block after a pass, with a low line for every mask."""
        shown = ("_" if t == self._mask else visible(self._piece(t)) for t in step.next)
        return (" " if self._numbers else "").join(shown)

    def cells(self, step: TraceStep) -> list[tuple[str, str]]:
        """(text, style) of every position after a pass; masked ones show untaken predictions."""
        out = []
        for position, token in enumerate(step.next):
            style = _NEW if position in step.committed else ""
            if token == self._mask:
                token, style = step.predicted[position], _TRIED
            out.append((visible(self._piece(token)), style))
        return out

    def line(self, step: TraceStep) -> str:
        """One pass: its place, how many positions it filled, the lowest confidence, the block."""
        lowest = "-" if step.lowest is None else f"{step.lowest:.3f}"
        return (
            f"{step.block:5d}  {step.step:4d}  {len(step.committed):9d}  {lowest:>6}  "
            f"{step.denoise_ms:8.2f}  {self.block(step)}"
        )


class LiveView:
    """Call it with every pass, then `end` it."""

    def __init__(self, words: Words, stream: TextIO | None = None) -> None:
        self._words, self._stream = words, stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._drawn = 0  # lines that the next drawing replaces
        self._passes = self._tokens = 0
        self._last: TraceStep | None = None
        if not self._terminal:
            self._write(_HEAD + "\n")

    def __call__(self, step: TraceStep) -> None:
        self._passes += 1
        self._tokens += len(step.committed)
        if not self._terminal:
            self._write(self._words.line(step) + "\n")
            return
        self._erase()
        if self._last is not None and self._last.block != step.block:
            self._settle(self._last)
        status = (
            f"block {step.block}  step {step.step}  {step.t:.0%} masked before  "
            f"{step.denoise_ms:.1f} ms  {len(step.committed)} committed  "
            f"{self._tokens / self._passes:.2f} tokens a pass"
        )
        lines = [f"{_BOLD}{status[: _columns()]}{_RESET}", *self._wrapped(step)]
        self._write("\n".join(lines) + "\n")
        self._drawn, self._last = len(lines), step

    def end(self) -> None:
        """Leaves the last block as text."""
        if self._terminal and self._last is not None:
            self._erase()
            self._settle(self._last)
            self._last = None

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\x1b[{self._drawn}F\x1b[J")
        self._drawn = 0

    def _settle(self, step: TraceStep) -> None:
        head = f"block {step.block:3d}  {step.step + 1:2d} passes  "
        block = _cut(self._words.block(step), _columns() - len(head))
        self._write(f"{_DIM}{head}{_RESET}{block}\n")

    def _wrapped(self, step: TraceStep) -> list[str]:
        """The cells in lines no wider than the terminal: its own wraps cannot be drawn over."""
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


def pass_lines(trace: Trace) -> list[str]:
    """A line a pass, under a heading."""
    words = Words.of(trace)
    return [_HEAD, *(words.line(step) for step in trace.steps)]


def summary(trace: Trace) -> dict[str, Any]:
    """The request, the result and a few figures of every pass, as plain data."""
    header = trace.header
    passes = [
        {
            "block": step.block,
            "step": step.step,
            "committed": len(step.committed),
            "lowest_confidence": step.lowest,
            "denoise_ms": step.denoise_ms,
        }
        for step in trace.steps
    ]
    return {
        "bundle": header.bundle,
        "target": header.target,
        "config": header.config,
        **asdict(trace.end),
        "passes": passes,
    }


def totals(trace: Trace) -> str:
    """Tokens, passes and times in one line."""
    usage, ms = trace.end.usage, trace.end.timings_ms
    return (
        f"-- {usage['completion_tokens']} tokens ({trace.end.finish_reason}), "
        f"{len(trace.steps)} passes in {len(trace.blocks)} blocks, "
        f"{usage['tokens_per_nfe']:.2f} tokens a pass; prefill {ms['prefill']:.1f} ms, "
        f"denoiser {ms['denoise']:.1f} ms, context {ms['extend']:.1f} ms"
    )


def diff_lines(a: Trace, b: Trace, diff: TraceDiff) -> list[str]:
    """Both traces, and where they diverge first."""
    names = [f"{trace.header.bundle} ({trace.header.target})" for trace in (a, b)]
    width = max(map(len, names))
    lines = [
        f"{side}  {name:<{width}}  {len(trace.steps)} passes, {len(trace.end.tokens)} tokens"
        for side, name, trace in zip("AB", names, (a, b), strict=True)
    ]
    if diff.sides is None:
        how = "" if diff.equal else ", but the texts end differently"
        lines.append(f"every pass commits the same{how}")
    else:
        lines.append(
            f"first difference: block {diff.block}, step {diff.step}, position {diff.position}"
        )
        for name, side in zip("AB", diff.sides, strict=True):
            if side.token is None:
                lines.append(f"  {name}  made no such pass")
                continue
            done = "committed" if side.committed else "left     "
            lines.append(
                f"  {name}  {done}  token {side.token} {side.piece!r}, "
                f"confidence {side.confidence:.6f}"
            )
        if diff.margin is not None:
            threshold = a.header.config["confidence_threshold"]
            between = diff.margin_of == "confidence"
            of = "between the confidences" if between else f"from the threshold {threshold:g}"
            lines.append(f"  margin {diff.margin:.6f} {of}")
    before = "before that " if diff.sides else ""
    lines.append(f"confidences {before}agree to {diff.agreed_to:.1e}")
    differ = "equal" if diff.tokens_equal else f"different from token {diff.first_token} on"
    return [*lines, f"final tokens: {differ}"]
