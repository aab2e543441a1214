"""THE block loop: read the prompts, then propose a block, take what each row wants of it, let the context tower read it, again.

Numbers that no sound engine returns are refused before any of them becomes text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

import numpy as np

from twotower.config import ModelConfig
from twotower.errors import EngineOutputError
from twotower.runtime.buffers import DenoiserArrays
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.device import Array, Event, HostStream, Streams
from twotower.runtime.noise import StepNoise
from twotower.runtime.results import Hooks, step_record
from twotower.runtime.rows import Commit, Row
from twotower.runtime.schedule import PrefillPlan, capacity_bucket, commit_floor
from twotower.runtime.workspace import Workspace
from twotower.spec import CANDIDATE_LOGPROBS, CONFIDENCE, CONTEXT, DENOISER, NEXT_BLOCK

__all__ = ["LoopSettings", "check_block", "check_candidates", "check_step", "prefill", "run_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """What the loop is given besides buffers and rows.

    Attributes:
        model: The model both towers compute.
        largest_capacity: Most positions the cache may grow to.
        streams: The towers' queues.
        hooks: The caller's callbacks.
    """

    model: ModelConfig
    largest_capacity: int
    streams: Streams = field(default_factory=Streams)
    hooks: Hooks = field(default_factory=Hooks)


def run_rows(
    work: Workspace, rows: Sequence[Row], plan: PrefillPlan, settings: LoopSettings
) -> Iterator[list[Commit]]:
    """Generates for rows of one mode and one block size, and yields what the rows take of each block.

    Args:
        work: Cleared buffers for exactly these rows, with room for the plan.
        rows: The requests.
        plan: How their prompts are read.
        settings: The rest.
    """
    for row in rows:
        row.start()
    run = _Run(work, rows, settings)
    propose = run.next_tokens if rows[0].config.mode == "ar" else run.denoised_block
    with Cleanup(run.wait):  # buffers are let go of only when nothing writes them any more
        run.context_event = prefill(work, rows, plan, settings)
        run.prepare(0)
        for index in count():
            tokens = propose(index)
            commits = [row.accept(tokens[i].tolist()) for i, row in enumerate(rows) if row.live]
            more = any(row.live for row in rows)
            if more:
                run.extend(
                    tokens
                )  # before the caller sees the block: a device reads it while the caller is busy
                run.prepare(index + 1)
            yield commits
            if not more:
                return


class _Run:
    """The passes of one call of `run_rows`, over buffers that stay where they are."""

    def __init__(self, work: Workspace, rows: Sequence[Row], settings: LoopSettings) -> None:
        self.context_event: Event = HostStream.done
        self._denoiser_event: Event = HostStream.done
        self._work, self._rows, self._settings = work, rows, settings
        self._streams, self._hooks, self._model = settings.streams, settings.hooks, settings.model
        self._next: Array = np.zeros((len(rows), 1), np.int64)
        self._noise: StepNoise | None = None
        if rows[0].config.mode == "diffusion":
            self._io = work.denoiser(rows[0].config.block_size)
            seeds, top_k = [row.seed for row in rows], [row.config.top_k for row in rows]
            _, size, candidates = self._io.noise.shape
            self._noise = StepNoise(seeds, top_k, size=(size, candidates))
            self._io.threshold[:] = [row.config.confidence_threshold for row in rows]
            self._io.temperature[:] = [row.sampling.temperature for row in rows]

    def wait(self) -> None:
        """Waits for the last pass of the context tower."""
        self.context_event.wait_done()

    def prepare(self, index: int) -> None:
        """Draws the noise of a block's first step while the context tower reads what is before it."""
        if self._noise is not None:
            live = [row.live for row in self._rows]
            self._draw_ahead(self.context_event, live, (index, 0))

    def denoised_block(self, index: int) -> Array:
        """Denoises one block of every live row, [B,S] int64."""
        io, noise, rows, started = self._io, self._noise, self._rows, perf_counter()
        assert noise is not None
        unmasked = int(
            self._model.mask_token_id == 0
        )  # any token that is no mask: an ended row has nothing to do
        masked = [io.block.shape[1] if row.live else 0 for row in rows]
        for i, row in enumerate(rows):
            io.block[i] = self._model.mask_token_id if row.live else unmasked
            io.context_length[i] = row.length if row.live else 0
        self._streams.denoiser.wait(self.context_event)
        steps = max(row.config.steps_per_block for row in rows if row.live)
        for step in range(steps):
            self._hooks.raise_if_cancelled()
            for i, row in enumerate(rows):
                io.commit_floor[i] = commit_floor(masked[i], step, row.config.steps_per_block)
            noise.write(io.noise, masked, block=index, step=step)
            began = perf_counter()
            self._denoiser_event = self._work.denoise(self._streams.denoiser)
            if step + 1 < steps:
                self._draw_ahead(self._denoiser_event, masked, (index, step + 1))
            self._denoiser_event.wait_done()
            ms = 1000 * (perf_counter() - began)
            check_step(rows, io, block=index, step=step)
            self._record((index, step), masked, ms)
            for i, row in enumerate(rows):
                row.nfe += masked[i] > 0
                row.batch_passes += row.live
            np.copyto(io.block, io.next_block)
            masked = io.masked_left.tolist()
            if not any(masked):
                break
        check_block(rows, io.block, self._model, block=index)
        self._spend("denoise", started)
        return io.block

    def next_tokens(self, index: int) -> Array:
        """The next token of every live row from the context tower alone, [B,1] int64."""
        started = perf_counter()
        self._hooks.raise_if_cancelled()
        self._work.head(self._streams.context).wait_done()
        for i, row in enumerate(self._rows):
            if row.live:
                ids, logprobs = self._work.candidate_ids[i], self._work.candidate_logprobs[i]
                check_candidates(row, ids, logprobs, self._model, token=index)
                self._next[i] = row.sampling.choose(ids, logprobs, index=index)
                row.nfe += 1
        self._spend("extend", started)
        return self._next

    def extend(self, tokens: Array) -> None:
        """Lets the context tower read a block, [B,L], of the rows that go on."""
        started, width, work = perf_counter(), tokens.shape[1], self._work
        needed = max(row.length for row in self._rows if row.live) + width
        if needed > work.capacity:
            self.context_event.wait_done()
            work.grow(capacity_bucket(needed, self._settings.largest_capacity))
        np.copyto(work.tokens(width), tokens)
        for i, row in enumerate(self._rows):
            # An ended row is written too, though nothing of it is valid: at position 0 it needs no
            # room and nobody reads it again.
            work.past_length[i], work.chunk_length[i] = (row.length, width) if row.live else (0, 0)
            row.length += width * row.live
        self._streams.context.wait(self._denoiser_event)
        self.context_event = work.extend(width, self._streams.context)
        self._spend("extend", started)

    def _draw_ahead(self, event: Event, live: Sequence[int], place: tuple[int, int]) -> None:
        """Draws the noise of a block and step, where an engine works meanwhile."""
        assert self._noise is not None
        if event is not HostStream.done:
            self._noise.draw(live, block=place[0], step=place[1])

    def _record(self, place: tuple[int, int], masked: Sequence[int], ms: float) -> None:
        if self._hooks.on_step is not None:
            named = tuple(
                row.index if left else -1 for row, left in zip(self._rows, masked, strict=True)
            )
            self._hooks.on_step(step_record(self._io, named, masked, place=place, ms=ms))

    def _spend(self, what: str, started: float) -> None:
        seconds = perf_counter() - started
        for row in self._rows:
            if row.live:
                setattr(row, what, getattr(row, what) + seconds)


def prefill(
    work: Workspace, rows: Sequence[Row], plan: PrefillPlan, settings: LoopSettings
) -> Event:
    """Lets the context tower read every row's prompt; returns the event of the last chunk, which has been waited for."""
    total, done, started = sum(len(row.prompt) for row in rows), 0, perf_counter()
    event: Event = HostStream.done
    for step in plan.steps:
        settings.hooks.raise_if_cancelled()
        chunk = work.tokens(step.width)
        chunk.fill(settings.model.pad_token_id)
        for i, row in enumerate(rows):
            start, length = step.starts[i], step.lengths[i]
            chunk[i, :length] = row.prompt[start : start + length]
        work.past_length[:], work.chunk_length[:] = step.starts, step.lengths
        event = work.extend(step.width, settings.streams.context)
        event.wait_done()  # the next chunk is written into the same buffer
        done += sum(step.lengths)
        if settings.hooks.on_prefill is not None:
            settings.hooks.on_prefill(done, total)
    for row in rows:
        row.prefill = perf_counter() - started
    return event


_DO = "run the request again; if it fails again, build the engine again, or try another target or a wider dtype (float16 overflows first)"


def check_step(rows: Sequence[Row], arrays: DenoiserArrays, *, block: int, step: int) -> None:
    """Checks what the denoiser returned for the rows that are alive.

    Raises:
        EngineOutputError: a confidence is not a number.
    """
    if np.isfinite(arrays.confidence).all():
        return
    for i, row in enumerate(rows):
        if row.live and not np.isfinite(arrays.confidence[i]).all():
            found = f"{CONFIDENCE} {_first_bad(arrays.confidence[i])}"
            raise _fault(DENOISER, f"row {row.index}, block {block}, step {step}", found)


def check_block(rows: Sequence[Row], tokens: Array, config: ModelConfig, *, block: int) -> None:
    """Checks a block that the denoiser says is complete, [B,S] int64.

    Raises:
        EngineOutputError: a token is a mask or outside the vocabulary.
    """
    wrong = (tokens < 0) | (tokens >= config.vocab_size) | (tokens == config.mask_token_id)
    if not wrong.any():
        return
    for i, row in enumerate(rows):
        if row.live and wrong[i].any():
            at = int(np.argmax(wrong[i]))
            found = f"{NEXT_BLOCK} holds {int(tokens[i, at])} at position {at} after the last step (masks are {config.mask_token_id}, "
            raise _fault(
                DENOISER,
                f"row {row.index}, block {block}",
                found + f"the vocabulary ends at {config.vocab_size - 1})",
            )


def check_candidates(
    row: Row, ids: Array, logprobs: Array, config: ModelConfig, *, token: int
) -> None:
    """Checks one row's candidates, [K] each; a candidate that cannot be chosen may have a log-probability of -inf, the best may not.

    Raises:
        EngineOutputError: a log-probability is not a number, or a token is outside the vocabulary.
    """
    if (
        np.isfinite(logprobs[0])
        and not np.isnan(logprobs).any()
        and ids.min() >= 0
        and ids.max() < config.vocab_size
    ):
        return
    found = f"{CANDIDATE_LOGPROBS} {_first_bad(logprobs)}; tokens {int(ids.min())} to {int(ids.max())} of {config.vocab_size}"
    raise _fault(CONTEXT, f"row {row.index}, token {token}", found)


def _fault(tower: str, where: str, found: str) -> EngineOutputError:
    return EngineOutputError(
        f"the {tower} engine returned numbers that cannot be right ({where})", found=found, do=_DO
    )


def _first_bad(values: Array) -> str:
    """The first value that is not finite, with its place; else the first value."""
    at = int(np.argmax(~np.isfinite(values)))
    return f"is {float(values[at])} at position {at}"
