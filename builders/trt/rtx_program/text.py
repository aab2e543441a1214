"""Finds the text of compiled programs in plan bytes, and splits it into sections and statements.

Sizes that depend on the shapes of a call are worked out for the greatest shapes of a profile. A
program computes them on the host, in its section `shape_main`: copies, constants and arithmetic on
single numbers. What is not understood stays unknown.
"""

from __future__ import annotations

import mmap
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from twotower.errors import BuildError

PlanBytes = bytes | bytearray | memoryview | mmap.mmap
"""A serialized engine, wherever it lies."""

LAYOUT = 5
"""The version of the text this module knows, as the text itself states it."""

_MARK = b"NLYM"
_BEGIN = b"header {\n"
_PREFIX = 16  # the mark, four bytes of a version, eight of the text's length
_HEADER = 64 << 10  # the memory budget is among the header's first lines
_CHUNK = 64 << 20
_NOT_TEXT = re.compile(rb"[^\t\n\r\x1e\x1f\x20-\x7e]")
_SECTION = re.compile(r"^(\w+) \{\n(.*?)^\}$", re.DOTALL | re.MULTILINE)
_STATEMENT = re.compile(r"^  (\w+)=\{ ?", re.MULTILINE)
_LABEL = re.compile(r" label \w+: ?")
_SECTIONS = ("header", "descriptors", "main", "shape_main")


class ProgramTextError(BuildError):
    """A plan whose compiled program is missing, damaged, or of an unknown layout."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One `operation={ key=value ... }` of a section."""

    operation: str
    body: str

    def word(self, key: str) -> str | None:
        """The value of a key, quotes taken off; None where the key is missing."""
        found = re.search(rf'(?<![\w"]){key} ?= ?(?:"([^"]*)"|([^\s"{{}}]+))', self.body)
        if found is None:
            return None
        if found[1] is None:
            return found[2]
        return found[1]

    def number(self, key: str) -> int:
        """A key's integer; ProgramTextError if missing or no number."""
        value = self.word(key)
        if value is None or not value.isdecimal():
            raise unreadable(f"'{self.operation}' has no number '{key}'")
        return int(value)

    def names(self, key: str) -> tuple[str, ...] | None:
        """The quoted names of a list `key={ "a" "b" }`; None where the key is missing."""
        found = re.search(rf'(?<![\w"]){key} ?= ?\{{((?:[^"}}]|"[^"]*")*)\}}', self.body)
        if found is None:
            return None
        return tuple(re.findall(r'"([^"]*)"', found[1]))


@dataclass(frozen=True, slots=True)
class ProgramText:
    """The four sections of a program; the last is empty where all shapes are fixed.

    `header` has keys and values as a statement has.
    """

    header: Statement
    descriptors: str
    main: str
    shape_main: str

    def statements(self, section: str) -> Iterator[Statement]:
        """Statements of `descriptors` or `main`, in order; ProgramTextError on branches."""
        text: str = getattr(self, section)
        labels = 0
        for line in text.splitlines():
            start = _STATEMENT.match(line)
            if start is not None and line.rstrip().endswith("}"):
                yield Statement(start[1], line[start.end() :])
            elif _LABEL.fullmatch(line):
                labels += 1
            elif line.strip():
                shown = line.strip()[:60]
                raise unreadable(f"'{section}' has a line that is no statement: {shown!r}")
        if labels > 1:
            why = "what a pass runs depends on its data"
            raise unreadable(f"'{section}' has {labels} labels: {why}")

    def host_statements(self) -> Iterator[Statement]:
        """The arithmetic on shapes that runs on the host; messages in it may take several lines."""
        starts = list(_STATEMENT.finditer(self.shape_main))
        for start, after in zip_longest(starts, starts[1:]):
            end = len(self.shape_main) if after is None else after.start()
            yield Statement(start[1], self.shape_main[start.end() : end])


def unreadable(why: str) -> ProgramTextError:
    """The error for a text that is not as expected."""
    return ProgramTextError(
        "the compiled program in the plan was not read",
        found=f"{why}; known: layout {LAYOUT} of TensorRT for RTX 1.7",
        do="build with TensorRT for RTX 1.7, or inspect the engine on a GPU",
    )


def program_texts(plan: PlanBytes) -> Iterator[str]:
    """The text of every whole program in a plan; those of single fusions inside are skipped.

    A program is one block: its size, a mark, a version, the length of its text, the text, code.
    Plans are searched in pieces of 64 MiB: one that holds its weights may have tens of GiB.

    Raises:
        ProgramTextError: a block is cut off, or does not begin with the text of a whole pass.
    """
    view = memoryview(plan).cast("B")
    at = _find_mark(view, 0)
    while at >= 0:
        start = at + _PREFIX
        if at < 8 or bytes(view[start : start + len(_BEGIN)]) != _BEGIN:
            at = _find_mark(view, at + 1)  # gigabytes of weights hold such four bytes by chance
            continue
        size = int.from_bytes(view[at - 8 : at], "little")
        length = int.from_bytes(view[start - 8 : start], "little")
        if at + size > len(view) or start + length > at + size:
            raise unreadable(f"the program at byte {at} is cut off or damaged")
        text = bytes(view[start : start + length])
        if b"\n  memory_budget = " not in text[:_HEADER]:
            raise unreadable(f"the program at byte {at} does not begin with the text of a pass")
        if _NOT_TEXT.search(text):
            raise unreadable(f"the program at byte {at} has bytes that are no text")
        yield text.decode("ascii")
        at = _find_mark(view, at + size)


def _find_mark(view: memoryview, first: int) -> int:
    """Where the next program's mark is, or -1; a piece overlaps the next by all but one byte."""
    for base in range(first, len(view), _CHUNK):
        found = bytes(view[base : base + _CHUNK + len(_MARK) - 1]).find(_MARK)
        if found >= 0:
            return base + found
    return -1


def split_text(text: str) -> ProgramText:
    """The sections of a program; ProgramTextError if unknown, missing or repeated."""
    sections: dict[str, str] = {}
    last, end = "nothing", 0
    for match in _SECTION.finditer(text):
        name = match[1]
        if text[end : match.start()].strip():
            raise unreadable(f"there is text outside of its sections, after '{last}'")
        if name not in _SECTIONS or name in sections:
            raise unreadable(f"it has an unexpected section '{name}'")
        sections[name] = match[2]
        last, end = name, match.end()
    missing = [name for name in _SECTIONS[:3] if name not in sections]
    if missing:
        raise unreadable(f"its section '{missing[0]}' is missing or has no end")
    if text[end:].strip():
        raise unreadable(f"it goes on after '{last}', or breaks off there")
    header, descriptors, main = (sections[name] for name in _SECTIONS[:3])
    return ProgramText(
        Statement("header", header),
        descriptors,
        main,
        sections.get("shape_main", ""),
    )


_BOUNDS = re.compile(
    r'msg="([^"]*?): shape input value at index 0 is out of bounds \[(-?\d+), (\d+)\]'
)
_CONSTANT = re.compile(r"(-?\d+)i64")

_ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: int(a / b) if b else 0,
    "min": min,
    "max": max,
    "and": lambda a, b: int(bool(a) and bool(b)),
    "or": lambda a, b: int(bool(a) or bool(b)),
    "eq": lambda a, b: int(a == b),
    "neq": lambda a, b: int(a != b),
    "lt": lambda a, b: int(a < b),
    "leq": lambda a, b: int(a <= b),
    "gt": lambda a, b: int(a > b),
    "geq": lambda a, b: int(a >= b),
}


def greatest_sizes(text: ProgramText) -> dict[str, int]:
    """Values of the size variables when every input has its greatest shape, by name."""
    values = {name: int(high) for name, _, high in _BOUNDS.findall(text.shape_main)}
    for statement in text.host_statements():
        outputs, inputs = statement.names("output"), statement.names("input") or ()
        if outputs is None or len(outputs) != 1 or outputs[0] in values:
            continue
        value = _value(statement, [values.get(name) for name in inputs])
        if value is not None:
            values[outputs[0]] = value
    return values


def _value(statement: Statement, inputs: list[int | None]) -> int | None:
    if statement.operation == "memset":
        constant = _CONSTANT.fullmatch(statement.word("src") or "")
        if constant is None:
            return None
        return int(constant[1])
    if statement.operation == "copy" and len(inputs) == 1:
        return inputs[0]
    if statement.operation == "select" and len(inputs) == 3 and inputs[0] is not None:
        if inputs[0]:
            return inputs[1]
        return inputs[2]
    known = [value for value in inputs if value is not None]
    if statement.operation in _ARITHMETIC and len(inputs) == len(known) == 2:
        return _ARITHMETIC[statement.operation](known[0], known[1])
    return None
