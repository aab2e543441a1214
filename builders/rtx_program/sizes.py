"""Sizes that depend on the shapes of a call, worked out for the greatest shapes of a profile.

A program computes such sizes on the host, in its section `shape_main`: copies, constants and
arithmetic on single numbers. What is not understood stays unknown.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

from twotower.builders.rtx_program.text import ProgramText, Statement

__all__ = ["greatest_sizes"]

_BOUNDS = re.compile(r'msg="([^"]*?): shape input value at index 0 is out of bounds \[(-?\d+), (\d+)\]')
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
        return None if constant is None else int(constant[1])
    if statement.operation == "copy" and len(inputs) == 1:
        return inputs[0]
    if statement.operation == "select" and len(inputs) == 3 and inputs[0] is not None:
        return inputs[1] if inputs[0] else inputs[2]
    known = [value for value in inputs if value is not None]
    if statement.operation in _ARITHMETIC and len(inputs) == len(known) == 2:
        return _ARITHMETIC[statement.operation](known[0], known[1])
    return None
