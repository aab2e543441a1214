"""The live view: drawn over itself on a terminal, a line a pass elsewhere, and no escape codes."""

from __future__ import annotations

import io
import re

import pytest

from tests.helpers.traces import MASK, small_trace
from twotower.trace import Trace
from twotower.trace.terminal import LiveView, Words, visible


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, trace: Trace) -> str:
    view = LiveView(Words(trace.piece, MASK, numbers=not trace.has_text), stream)
    for step in trace.steps:
        view(step)
    view.end()
    return stream.getvalue()


def screen(text: str) -> list[str]:
    """What is left on the screen: the two movements the view uses, carried out."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+F\x1b\[J|\n)", re.sub(r"\x1b\[[\d;]*m", "", text)):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            assert lines[-1] == "", "it goes up from the start of a line"
            up = int(part[2:].split("F")[0])
            assert up < len(lines), "it never goes above its own first line"
            lines = [*lines[: -1 - up], ""]
        else:
            assert "\x1b" not in part
            lines[-1] += part
    return lines


def test_a_terminal_keeps_one_line_a_block() -> None:
    assert screen(drawn(Terminal(), small_trace())) == [
        "block   0   3 passes  one two\u23ce",
        "block   1   3 passes  three!</s></s>",
        "",
    ]


@pytest.mark.parametrize("columns", (20, 33, 200))
def test_no_line_is_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))  # not a patched function: pytest asks it too
    trace = small_trace(pieces={10: "\u4e16\u754c" * 30, 14: "x" * 300})
    text = re.sub(r"\x1b\[[\d;]*[mFJ]", "", drawn(Terminal(), trace))
    wide = [sum(2 if "\u4e00" <= c <= "\u9fff" else 1 for c in line) for line in text.split("\n")]
    assert max(wide) <= max(columns, 24)


def test_the_current_block_shows_what_is_new_and_what_was_rejected() -> None:
    text = drawn(Terminal(), small_trace())
    first = text[: text.index("\x1b[2F")]
    assert "\x1b[30;46m one " in first
    assert "\x1b[2;3m guess " in first


def test_elsewhere_a_pass_is_a_line() -> None:
    lines = drawn(io.StringIO(), small_trace()).splitlines()
    assert len(lines) == 1 + len(small_trace().steps)
    assert lines[1].split()[:5] == ["0", "0", "2", "0.950", "5.00"]
    assert lines[1].endswith("one __")
    numbers = drawn(io.StringIO(), small_trace(text=None)).splitlines()
    assert numbers[1].endswith("  10 11 _ _")


def test_characters_that_would_move_the_cursor_are_shown() -> None:
    assert visible("a\x1b[2J\r\nb\t\u202e") == "a\ufffd[2J\ufffd\u23ceb\u21e5\ufffd"
    assert "\x1b]" not in drawn(Terminal(), small_trace(pieces={10: "\x1b]0;title\x07"}))
