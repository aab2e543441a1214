"""THE block loop: read the prompts, denoise a block, hand it over, extend the context, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twotower.config import GenerationConfig
from twotower.errors import EngineOutputError, RequestCancelledError
from twotower.runtime.results import Timings
from twotower.runtime.sampler import block_noise, choose_token
from twotower.runtime.schedule import capacity_bucket, commit_floor, plan_prefill
from twotower.runtime.stopping import RowText
from twotower.runtime.workspace import Workspace

__all__ = ["Hooks", "Row", "StepRecord", "run_rows"]

Ids = np.ndarray[Any, np.dtype[np.int64]]
Piece = tuple["Row", tuple[int, ...], str | None]


@dataclass(slots=True)
class Row:
    """One text of a batch and what it has cost so far."""

    prompt: tuple[int, ...]
    config: GenerationConfig
    answer: RowText
    length: int = 0
    nfe: int = 0
    blocks: int = 0
    timings: Timings = field(default_factory=Timings)

    @property
    def live(self) -> bool:
        return self.answer.finish_reason is None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One denoising step of a batch as it was run; the arrays [B,S] are copies, `live` [B] says which rows took part."""

    block: int
    step: int
    block_in: Ids
    predicted: Ids
    confidence: np.ndarray[Any, np.dtype[np.float32]]
    next_block: Ids
    live: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a caller may watch or stop: prefill progress (tokens done, in all), every step, cancellation."""

    on_prefill: Callable[[int, int], None] | None = None
    on_step: Callable[[StepRecord], None] | None = None
    cancelled: Callable[[], bool] | None = None

    def check(self) -> None:
        if self.cancelled and self.cancelled():
            raise RequestCancelledError("the request was cancelled", found="its caller asked for it", do="send it again to start over")


def run_rows(work: Workspace, rows: Sequence[Row], *, mask_token: int, hooks: Hooks) -> Iterator[Piece]:
    """Generates all rows, which share a mode and a block size; yields (row, its new tokens, its new text) as blocks are committed.

    Raises:
        EngineOutputError: an engine returned NaN for a row.
        RequestCancelledError: `hooks.cancelled` said so, between two steps.
    """
    clock = _Clock(rows)
    work.reset()
    _prefill(work, rows, hooks)
    clock.lap("prefill")
    autoregressive = rows[0].config.mode == "ar"
    width = 1 if autoregressive else work.block_size
    for index in range(max(-(-row.config.max_new_tokens // width) for row in rows)):
        if autoregressive:
            chosen = _next_tokens(work, rows, hooks)
        else:
            chosen = _denoised(work, rows, index, mask_token=mask_token, hooks=hooks)
        clock.lap("denoise")
        for row, ids in zip(rows, chosen, strict=True):
            if row.live:
                yield row, *row.answer.feed(ids)
        clock.skip()  # the time between two pieces is the caller's
        if not any(row.live for row in rows):
            return
        _extend(work, rows, [ids if row.live else [] for row, ids in zip(rows, chosen, strict=True)], width)
        clock.lap("extend")


def _prefill(work: Workspace, rows: Sequence[Row], hooks: Hooks) -> None:
    lengths = [len(row.prompt) for row in rows]
    done = 0
    for step in plan_prefill(lengths):
        hooks.check()
        pieces = [row.prompt[s : s + n] for row, s, n in zip(rows, step.starts, step.counts, strict=True)]
        work.extend(pieces, step.starts, width=step.width).wait_done()
        done += sum(step.counts)
        if hooks.on_prefill:
            hooks.on_prefill(done, sum(lengths))
    for row, length in zip(rows, lengths, strict=True):
        row.length = length


def _denoised(work: Workspace, rows: Sequence[Row], index: int, *, mask_token: int, hooks: Hooks) -> list[list[int]]:
    """One block of every live row, from all masks to none. Finished rows hold no mask and so pass through unchanged."""
    configs = [row.config for row in rows]
    block = work.start_block([r.length for r in rows], [c.confidence_threshold for c in configs], [c.temperature for c in configs])
    live = np.array([row.live for row in rows])
    block[:] = np.where(live[:, None], mask_token, 0 if mask_token else 1)
    left = np.where(live, work.block_size, 0)
    floors, noise = work.step_inputs
    next_block, predicted, confidence, masked_left = work.step_outputs
    for row in rows:
        row.blocks += row.live
    for step in range(max(c.steps_per_block for c in configs)):
        hooks.check()
        for i, config in enumerate(configs):
            floors[i] = commit_floor(int(left[i]), step, config.steps_per_block)
            block_noise(config, index, step, noise[i])
        work.denoise().wait_done()
        busy = left > 0
        _require_finite(confidence[busy], f"the denoiser returned NaN or infinity in block {index}, step {step}")
        if hooks.on_step:
            hooks.on_step(StepRecord(index, step, block.copy(), predicted.copy(), confidence.copy(), next_block.copy(), busy))
        for row, took_part in zip(rows, busy, strict=True):
            row.nfe += bool(took_part)
        block[:], left[:] = next_block, np.where(busy, masked_left, 0)
        if not left.any():
            break
    return [[int(t) for t in ids] for ids in block]


def _next_tokens(work: Workspace, rows: Sequence[Row], hooks: Hooks) -> list[list[int]]:
    """One autoregressive token of every live row, from the head on the last hidden vector."""
    hooks.check()
    work.score().wait_done()
    ids, logprobs = work.candidates
    live = [i for i, row in enumerate(rows) if row.live]
    _require_finite(logprobs[live, 0], f"the context head returned NaN or infinity after {rows[live[0]].nfe} tokens")
    out: list[list[int]] = [[0] for _ in rows]
    for i in live:
        out[i] = [choose_token(ids[i], logprobs[i], rows[i].config, rows[i].nfe)]
        rows[i].nfe += 1
        rows[i].blocks += 1
    return out


def _extend(work: Workspace, rows: Sequence[Row], tokens: Sequence[Sequence[int]], width: int) -> None:
    """The context tower reads what was committed. A finished row reads nothing, and its padding goes where nobody looks: slot 0."""
    past = [row.length if row.live else 0 for row in rows]
    work.ensure_capacity(capacity_bucket(max(past) + width), max(past))
    work.extend(tokens, past, width=width).wait_done()
    for row in rows:
        row.length += width * row.live


def _require_finite(values: np.ndarray[Any, Any], what: str) -> None:
    if not np.isfinite(values).all():
        raise EngineOutputError(
            what, found="values no sound engine computes", do="run `twotower doctor BUNDLE`; in float16, export as bfloat16 or float32 instead"
        )


class _Clock:
    """Adds up each phase for the rows that are live when it ends."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        spent, self._last = 1000 * (now - self._last), now
        for row in self._rows:
            if row.live:
                setattr(row.timings, phase, getattr(row.timings, phase) + spent)
                row.timings.total += spent

    def skip(self) -> None:
        self._last = time.perf_counter()
