"""A diffusion generation recorded pass by pass: as data, as a file of JSON lines, and as a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from twotower import __version__
from twotower.config import GenerationConfig
from twotower.errors import TraceError
from twotower.files import write_output
from twotower.records import RecordError, decode
from twotower.report.pages import script_data
from twotower.runtime import StepRecord, TwoTower

KIND = "twotower-trace"
SCHEMA = 1
_AGAIN = "record it again with `twotower trace BUNDLE PROMPT -o FILE.jsonl`"
_FIGURES = ("completion_tokens", "tokens_per_nfe", "prefill", "denoise", "extend", "total")
_DIGITS = 6  # of a confidence: float32 has no more


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What was run, recorded by version `twotower`.

    Names of bundle folder and target are empty where the engines were handed over open; `prompt` is
    None where token ids were given. `config` is `GenerationConfig.to_json()` with the seed that was
    used; `pieces` are texts of every token id that occurs, numbers without a tokenizer.
    """

    twotower: str
    bundle: str
    target: str
    prompt: str | None
    prompt_tokens: list[int]
    config: dict[str, Any]
    block_size: int
    mask_token_id: int
    pieces: dict[str, str]

    def __post_init__(self) -> None:
        has_threshold = isinstance(self.config.get("confidence_threshold"), (int, float))
        if self.block_size < 1 or not has_threshold:
            raise ValueError("blocks of no size, or a config without confidence_threshold")
        _require_ids([self.mask_token_id, *self.prompt_tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One denoiser pass; every list but `committed` (positions it filled) has S entries.

    `t` is the masked fraction of the block before the pass; `tokens` and `next` are the block
    before and after; predictions are of all positions, masked or not, confidences have six digits;
    `denoise_ms` is wall-clock time.
    """

    block: int
    step: int
    t: float
    tokens: list[int]
    predicted: list[int]
    confidence: list[float]
    committed: list[int]
    next: list[int]
    denoise_ms: float

    def __post_init__(self) -> None:
        lengths = {
            len(self.tokens),
            len(self.predicted),
            len(self.confidence),
            len(self.next),
        }
        outside = [p for p in self.committed if not 0 <= p < len(self.tokens)]
        if len(lengths) > 1 or outside:
            raise ValueError("lists of different lengths, or positions outside of them")
        _require_ids([*self.tokens, *self.predicted, *self.next])

    @property
    def lowest(self) -> float | None:
        """The lowest confidence of what was filled; None where nothing was."""
        return min((self.confidence[position] for position in self.committed), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceBlock:
    """One finished block with its S tokens, which in the last one may go on past the text's end.

    `extend_ms` is from the end of its last pass to the start of the next block's first, while the
    context tower reads the block; an engine that works beside the host may move some of that into
    the pass. None for the last block, which is never read.
    """

    block: int
    tokens: list[int]
    extend_ms: float | None

    def __post_init__(self) -> None:
        _require_ids(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEnd:
    """The result, as in `Generation`."""

    finish_reason: str
    tokens: list[int]
    text: str | None
    usage: dict[str, float]
    timings_ms: dict[str, float]

    def __post_init__(self) -> None:
        known = {*self.usage, *self.timings_ms}
        missing = [name for name in _FIGURES if name not in known]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        _require_ids(self.tokens)


def _require_ids(tokens: Sequence[int]) -> None:
    if min(tokens, default=0) < 0:
        raise ValueError("a negative token id")


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole recording."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    blocks: tuple[TraceBlock, ...]
    end: TraceEnd

    def piece(self, token: int) -> str:
        """Text of a token that occurs in the trace; the number of any other."""
        return self.header.pieces.get(str(token), str(token))

    @property
    def has_text(self) -> bool:
        """Whether pieces are text and not numbers."""
        return self.end.text is not None


def record_trace(
    model: TwoTower,
    prompt: str | Sequence[int],
    config: GenerationConfig | None = None,
    *,
    bundle: str = "",
    watch: Callable[[TraceStep], None] | None = None,
) -> Trace:
    """Generates one text and keeps every pass; `watch` is called with each as it comes.

    `bundle` is the name of its folder, for the header.

    Raises:
        TraceError: the mode is not `diffusion`.
        RequestError: the request cannot be served.
    """
    config = config or model.defaults
    if config.mode != "diffusion":
        raise TraceError(
            f"there is nothing to trace in mode {config.mode!r}",
            found="a trace is of denoiser passes, which the context tower alone does not make",
            do="leave out `--mode`, or use `twotower generate`",
        )
    recorder = _Recorder(model.config.mask_token_id, watch)
    result = model.generate(
        prompt if isinstance(prompt, str) else list(prompt) or [model.config.bos_token_id],
        config,
        on_step=recorder,
    )
    if result.seed is not None:
        config = replace(config, seed=result.seed)  # as drawn: the trace can be made again
    piece = model.tokenizer.piece if model.tokenizer else str
    ids = prompt
    if isinstance(ids, str):
        assert model.tokenizer is not None  # or the generation had refused the text
        ids = model.tokenizer.encode(ids)
    tokens = [int(t) for t in ids] or [model.config.bos_token_id]  # as the session reads it
    seen = {*tokens, model.config.mask_token_id}
    for step in recorder.steps:
        seen.update(step.predicted, step.next)
    header = TraceHeader(
        twotower=__version__,
        bundle=bundle,
        target=model.target,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_tokens=tokens,
        config=config.to_json(),
        block_size=config.block_size,
        mask_token_id=model.config.mask_token_id,
        pieces={str(t): piece(t) for t in sorted(seen)},
    )
    facts = result.to_json()
    end = TraceEnd(
        finish_reason=result.finish_reason,
        tokens=list(result.tokens),
        text=result.text,
        usage=facts["usage"],
        timings_ms={k: round(v, 3) for k, v in facts["timings_ms"].items()},
    )
    return Trace(
        header,
        tuple(recorder.steps),
        recorder.blocks(),
        end,
    )


class _Recorder:
    """The `on_step` of a recording: passes in plain data, and the time between blocks."""

    def __init__(self, mask: int, watch: Callable[[TraceStep], None] | None) -> None:
        self.steps: list[TraceStep] = []
        self._mask, self._watch = mask, watch
        self._extend_ms: list[float] = []
        self._left = 0.0

    def __call__(self, record: StepRecord) -> None:
        arrived = perf_counter()
        if self.steps and record.step == 0:
            self._extend_ms.append(round(max(1000 * (arrived - self._left) - record.ms, 0.0), 3))
        before, after = record.block_in[0], record.next_block[0]
        step = TraceStep(
            block=record.block_index,
            step=record.step,
            t=round(float(record.t[0]), _DIGITS),
            tokens=before.tolist(),
            predicted=record.predicted[0].tolist(),
            confidence=[round(float(c), _DIGITS) for c in record.confidence[0]],
            committed=np.flatnonzero((before == self._mask) & (after != self._mask)).tolist(),
            next=after.tolist(),
            denoise_ms=round(record.ms, 3),
        )
        self.steps.append(step)
        if self._watch is not None:
            self._watch(step)
        self._left = perf_counter()  # the watcher's own time is nobody's

    def blocks(self) -> tuple[TraceBlock, ...]:
        """The blocks of the passes so far."""
        tokens = {step.block: step.next for step in self.steps}
        times = [*self._extend_ms, None]
        return tuple(TraceBlock(block=b, tokens=t, extend_ms=times[b]) for b, t in tokens.items())


_Line = TypeVar("_Line", TraceHeader, TraceStep, TraceBlock, TraceEnd)


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
    write_output(
        path,
        "".join(f"{line}\n" for line in trace_lines(trace)),
        error=TraceError,
    )


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
    place: tuple[int, int | None]
    number = 0  # of the next pass in its block
    for where, entry in entries[1:]:
        kind = entry.get("type")
        if end is not None:
            raise _malformed(where, "it comes after the end line")
        if kind == "end":
            end = _decoded(TraceEnd, where, entry)
            continue
        if kind == "step":
            steps.append(_decoded(TraceStep, where, entry))
            place, expected = (steps[-1].block, steps[-1].step), (len(blocks), number)
            size = len(steps[-1].tokens)
            number += 1
        elif kind == "block":
            blocks.append(_decoded(TraceBlock, where, entry))
            last = steps[-1].block if steps else None
            place, expected = (blocks[-1].block, last), (len(blocks) - 1, len(blocks) - 1)
            size = len(blocks[-1].tokens)
            number = 0
        else:
            raise _malformed(where, f"type {kind!r}; known: step, block, end")
        if place != expected:
            raise _malformed(where, f"{kind} {place} where {expected} was expected")
        if size != header.block_size:
            raise _malformed(where, f"{size} tokens in a block of {header.block_size}")
    if end is None or not blocks or len(blocks) != len({s.block for s in steps}):
        found = (
            f"{len(blocks)} finished block(s), {len(steps)} pass(es) and "
            f"{'no' if end is None else 'an'} end line"
        )
        raise TraceError(f"the trace {path} is truncated", found=found, do=_AGAIN)
    return Trace(header, tuple(steps), tuple(blocks), end)


def trace_page(trace: Trace) -> str:
    """The page; its script shows strings of the trace by `textContent` only."""
    page = (resources.files("twotower.trace") / "trace.html").read_text(encoding="utf-8")
    return page.replace("{{trace}}", script_data(asdict(trace)), 1)
