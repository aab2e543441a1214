"""Traces as files: JSON lines that are checked when they are read, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from twotower.errors import TraceError
from twotower.files import write_output
from twotower.trace.record import KIND, SCHEMA, Trace, TraceBlock, TraceEnd, TraceHeader, TraceStep

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
    entries = [
        _object(f"line {n} of {path}", line) for n, line in enumerate(lines, 1) if line.strip()
    ]
    if not entries or entries[0].get("kind") != KIND:
        found = f'its first line has no "kind": "{KIND}"' if entries else "the file is empty"
        raise TraceError(
            f"{path} is not a trace", found=found, do="name a file that `twotower trace -o` wrote"
        )
    if entries[0].get("schema") != SCHEMA:
        found = (
            f"schema {entries[0].get('schema')!r}; this version of twotower reads schema {SCHEMA}"
        )
        raise TraceError(f"the trace {path} is of another schema", found=found, do=_AGAIN)
    header = TraceHeader(**_checked(f"line 1 of {path}", entries[0], _HEADER))
    numbers = [n for n, line in enumerate(lines, 1) if line.strip()]
    return _Reader(str(path), header).read(zip(numbers, entries, strict=True))


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


class _Reader:
    """Takes the lines in order and knows which may come next."""

    def __init__(self, path: str, header: TraceHeader) -> None:
        self._path, self._header = path, header
        self._steps: list[TraceStep] = []
        self._blocks: list[TraceBlock] = []

    def read(self, entries: Iterator[tuple[int, dict[str, Any]]]) -> Trace:
        end: TraceEnd | None = None
        next(entries)  # the header
        for number, entry in entries:
            where = f"line {number} of {self._path}"
            kind = entry.get("type")
            if end is not None:
                raise _malformed(where, "it comes after the end line")
            if kind == "step":
                self._step(where, TraceStep(**_checked(where, entry, _STEP)))
            elif kind == "block":
                self._block(where, TraceBlock(**_checked(where, entry, _BLOCK)))
            elif kind == "end":
                end = TraceEnd(**_checked(where, entry, _END))
            else:
                raise _malformed(where, f"type {kind!r}; known: step, block, end")
        begun = len({s.block for s in self._steps})
        if end is None or not self._blocks or len(self._blocks) != begun:
            found = (
                f"{len(self._blocks)} finished block(s), {len(self._steps)} pass(es) and "
                f"{'no' if end is None else 'an'} end line"
            )
            raise TraceError(f"the trace {self._path} is truncated", found=found, do=_AGAIN)
        return Trace(
            self._header,
            tuple(self._steps),
            tuple(self._blocks),
            end,
        )

    def _step(self, where: str, step: TraceStep) -> None:
        block = len(self._blocks)
        expected = (block, sum(s.block == block for s in self._steps))
        if (step.block, step.step) != expected:
            wanted = f"{expected[0]}, {expected[1]} was expected"
            raise _malformed(where, f"block {step.block}, step {step.step} where {wanted}")
        size = self._header.block_size
        lengths = {len(x) for x in (step.tokens, step.predicted, step.confidence, step.next)}
        if lengths != {size} or any(not 0 <= p < size for p in step.committed):
            raise _malformed(where, f"lists or positions that do not fit blocks of {size}")
        self._steps.append(step)

    def _block(self, where: str, block: TraceBlock) -> None:
        if (
            block.block != len(self._blocks)
            or not self._steps
            or self._steps[-1].block != block.block
        ):
            raise _malformed(
                where, f"block {block.block} where a pass of block {len(self._blocks)} was expected"
            )
        if len(block.tokens) != self._header.block_size:
            raise _malformed(
                where, f"{len(block.tokens)} tokens in a block of {self._header.block_size}"
            )
        self._blocks.append(block)


def _checked(
    where: str, entry: dict[str, Any], checks: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    """The fields of a line that are known, each of its kind; others are of later versions."""
    for name, check in checks.items():
        if name not in entry:
            raise _malformed(where, f"no {name!r}")
        if not check(entry[name]):
            raise _malformed(where, f"{name} is {json.dumps(entry[name])[:60]}")
    return {name: entry[name] for name in checks}


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _real(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and all(map(check, x))


def _object_of(check: Callable[[Any], bool], *names: str) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, dict) and all(map(check, x.values())) and set(names) <= set(x)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: x is None or check(x)


_HEADER = {
    **dict.fromkeys(("twotower", "bundle", "target"), _text),
    "prompt": _or_none(_text),
    "prompt_tokens": _list_of(_whole),
    "config": lambda x: isinstance(x, dict) and _real(x.get("confidence_threshold")),
    "block_size": lambda x: _whole(x) and x > 0,
    "mask_token_id": _whole,
    "pieces": _object_of(_text),
}
_STEP = {
    **dict.fromkeys(("block", "step"), _whole),
    **dict.fromkeys(("t", "denoise_ms"), _real),
    **dict.fromkeys(("tokens", "predicted", "committed", "next"), _list_of(_whole)),
    "confidence": _list_of(_real),
}
_BLOCK = {"block": _whole, "tokens": _list_of(_whole), "extend_ms": _or_none(_real)}
_END = {
    "finish_reason": _text,
    "tokens": _list_of(_whole),
    "text": _or_none(_text),
    "usage": _object_of(_real, "completion_tokens", "tokens_per_nfe"),
    "timings_ms": _object_of(_real, "prefill", "denoise", "extend", "total"),
}


_PLACE = "{{trace}}"


def trace_page(trace: Trace) -> str:
    """The page; its script shows strings of the trace by `textContent` only."""
    before, _, after = (
        (resources.files("twotower.trace") / "trace.html")
        .read_text(encoding="utf-8")
        .partition(_PLACE)
    )
    # Not only "</": a "<!--" inside a script element would change where the browser sees the
    # element's end.
    return before + json.dumps(asdict(trace)).replace("<", "\\u003c") + after
