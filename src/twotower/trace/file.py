"""Traces as files: JSON lines that are checked when they are read, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from twotower.errors import TraceError
from twotower.files import write_output
from twotower.records import RecordError, decode
from twotower.report.pages import script_data
from twotower.trace.record import KIND, SCHEMA, Trace, TraceBlock, TraceEnd, TraceHeader, TraceStep

_Line = TypeVar("_Line", TraceHeader, TraceStep, TraceBlock, TraceEnd)
_AGAIN = "record it again with `twotower trace BUNDLE PROMPT -o FILE.jsonl`"


def trace_lines(trace: Trace) -> Iterator[str]:
    """The lines of the file: header, every pass, every block after its last pass, end."""
    yield json.dumps({"schema": SCHEMA, "kind": KIND, **asdict(trace.header)})
    for block in trace.blocks:
        for step in trace.steps:
            if step.block == block.block:
                yield json.dumps({"type": "step", **asdict(step)})
        yield json.dumps({"type": "block", **asdict(block)})
    yield json.dumps({"type": "end", **asdict(trace.end)})


def write_trace(path: Path, trace: Trace) -> None:
    """Writes the file; TraceError if it cannot, and then an earlier file is untouched."""
    write_output(path, "".join(f"{line}\n" for line in trace_lines(trace)), error=TraceError)


def read_trace(path: Path) -> Trace:
    """Reads and checks a file.

    Raises:
        TraceError: it is no trace, of another schema, malformed (the line is named) or has no end.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise TraceError(
            f"cannot read the trace {path}",
            found=str(e),
            do="name a file that `twotower trace -o` wrote",
        ) from e
    places = {f"line {n} of {path}": line for n, line in enumerate(lines, 1) if line.strip()}
    entries = [(where, _object(where, line)) for where, line in places.items()]
    if not entries or entries[0][1].get("kind") != KIND:
        found = f'its first line has no "kind": "{KIND}"' if entries else "the file is empty"
        raise TraceError(
            f"{path} is not a trace", found=found, do="name a file that `twotower trace -o` wrote"
        )
    schema = entries[0][1].get("schema")
    if schema != SCHEMA:
        found = f"schema {schema!r}; this version of twotower reads schema {SCHEMA}"
        raise TraceError(f"the trace {path} is of another schema", found=found, do=_AGAIN)
    return _trace(path, entries)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        data = json.loads(line, parse_constant=_no_constant)
    except ValueError as e:
        raise TraceError(
            f"{where} is not JSON",
            found=f"{e}: {line[:60]!r}",
            do=f"the file may have been cut or edited; {_AGAIN}",
        ) from e
    if not isinstance(data, dict):
        raise _malformed(where, f"{line[:60]!r}, which is not an object")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number a trace may hold")


def _malformed(where: str, found: str) -> TraceError:
    return TraceError(f"{where} does not belong in a trace", found=found, do=_AGAIN)


def _decoded(kind: type[_Line], where: str, entry: dict[str, Any]) -> _Line:
    """A line as what it is; fields that are not known are of later versions."""
    try:
        return decode(kind, entry, strict=False)
    except RecordError as e:
        raise _malformed(where, str(e)) from e


def _trace(path: Path, entries: list[tuple[str, dict[str, Any]]]) -> Trace:
    """The lines in their order, the header first."""
    header = _decoded(TraceHeader, *entries[0])
    steps: list[TraceStep] = []
    blocks: list[TraceBlock] = []
    end: TraceEnd | None = None
    for where, entry in entries[1:]:
        kind = entry.get("type")
        if end is not None:
            raise _malformed(where, "it comes after the end line")
        if kind == "step":
            steps.append(_decoded(TraceStep, where, entry))
            expected = len(blocks), sum(s.block == len(blocks) for s in steps[:-1])
            wrong = _wrong_step(steps[-1], expected, header.block_size)
        elif kind == "block":
            blocks.append(_decoded(TraceBlock, where, entry))
            expected = len(blocks) - 1, steps[-1].block if steps else -1
            wrong = _wrong_block(blocks[-1], expected, header.block_size)
        elif kind == "end":
            end, wrong = _decoded(TraceEnd, where, entry), ""
        else:
            wrong = f"type {kind!r}; known: step, block, end"
        if wrong:
            raise _malformed(where, wrong)
    if end is None or not blocks or len(blocks) != len({s.block for s in steps}):
        found = (
            f"{len(blocks)} finished block(s), {len(steps)} pass(es) and "
            f"{'no' if end is None else 'an'} end line"
        )
        raise TraceError(f"the trace {path} is truncated", found=found, do=_AGAIN)
    return Trace(header, tuple(steps), tuple(blocks), end)


def _wrong_step(step: TraceStep, expected: tuple[int, int], size: int) -> str:
    """What is wrong with a pass where (block, step) was expected; empty if nothing is."""
    if (step.block, step.step) != expected:
        wanted = f"{expected[0]}, {expected[1]} was expected"
        return f"block {step.block}, step {step.step} where {wanted}"
    lengths = {len(x) for x in (step.tokens, step.predicted, step.confidence, step.next)}
    if lengths != {size} or any(not 0 <= p < size for p in step.committed):
        return f"lists or positions that do not fit blocks of {size}"
    return ""


def _wrong_block(block: TraceBlock, expected: tuple[int, int], size: int) -> str:
    """The same of a block, by its number and that of the last pass."""
    if expected != (block.block, block.block):
        return f"block {block.block} where a pass of block {expected[0]} was expected"
    return "" if len(block.tokens) == size else f"{len(block.tokens)} tokens in a block of {size}"


def trace_page(trace: Trace) -> str:
    """The page; its script shows strings of the trace by `textContent` only."""
    page = (resources.files("twotower.trace") / "trace.html").read_text(encoding="utf-8")
    return page.replace("{{trace}}", script_data(asdict(trace)), 1)
