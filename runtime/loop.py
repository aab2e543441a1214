"""THE block loop: propose a block, take what each row wants, let the context tower read it, again.

Numbers that no sound engine returns are refused before any of them becomes text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from time import perf_counter

import numpy as np

from twotower.errors import EngineOutputError
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.device import Array, Event, HostStream
from twotower.runtime.results import BlockEvent, Hooks, StepRecord
from twotower.runtime.rows import Row
from twotower.runtime.sampling import StepNoise
from twotower.runtime.schedule import PrefillPlan, capacity_bucket, commit_floor
from twotower.runtime.workspace import Workspace
from twotower.spec import CANDIDATE_LOGPROBS, CONFIDENCE, CONTEXT, DENOISER, NEXT_BLOCK


class BlockLoop:
    """Generates for rows of one mode and block size, in cleared buffers for just these rows."""

    def __init__(self, work: Workspace, rows: Sequence[Row], hooks: Hooks) -> None:
        self._work, self._rows, self._hooks = work, rows, hooks
        self._context_event: Event = HostStream.done
        self._denoiser_event: Event = HostStream.done
        self._next: Array = np.zeros((len(rows), 1), np.int64)
        self._noise: StepNoise | None = None
        if rows[0].config.mode == "diffusion":
            self._io = work.denoiser(rows[0].config.block_size)
            seeds, top_k = [row.seed for row in rows], [row.config.top_k for row in rows]
            _, size, candidates = self._io.noise.shape
            self._noise = StepNoise(seeds, top_k, size=(size, candidates))
            self._io.threshold[:] = [row.config.confidence_threshold for row in rows]
            self._io.temperature[:] = [row.sampling.temperature for row in rows]

    def run(self, plan: PrefillPlan) -> Iterator[BlockEvent]:
        """Reads the prompts as planned, then yields what the rows take of each block."""
        for row in self._rows:
            row.start()
        propose = self._denoised_block if self._noise is not None else self._next_tokens
        with Cleanup(self._wait):  # buffers are let go of only when nothing writes them any more
            self._prefill(plan)
            self._prepare(0)
            for index in count():
                tokens = propose(index)
                events = [
                    row.accept(tokens[i].tolist()) for i, row in enumerate(self._rows) if row.live
                ]
                more = any(row.live for row in self._rows)
                if more:
                    # before the caller sees the block: a device reads it while the caller is busy
                    self._extend(tokens)
                    self._prepare(index + 1)
                yield from events
                if not more:
                    return

    def _wait(self) -> None:
        self._context_event.wait_done()

    def _prefill(self, plan: PrefillPlan) -> None:
        """Lets the context tower read every row's prompt, and waits for it."""
        work, rows, started = self._work, self._rows, perf_counter()
        total, done = sum(len(row.prompt) for row in rows), 0
        for step in plan.steps:
            self._hooks.raise_if_cancelled()
            chunk = work.tokens(step.width)
            chunk.fill(work.model.pad_token_id)
            for i, row in enumerate(rows):
                start, length = step.starts[i], step.lengths[i]
                chunk[i, :length] = row.prompt[start : start + length]
            work.past_length[:], work.chunk_length[:] = step.starts, step.lengths
            self._context_event = work.extend(step.width)
            self._wait()  # the next chunk is written into the same buffer
            done += sum(step.lengths)
            if self._hooks.on_prefill is not None:
                self._hooks.on_prefill(done, total)
        self._spend("prefill", started)

    def _prepare(self, index: int) -> None:
        """Draws the noise of a block's first step while the context tower reads before it."""
        if self._noise is not None:
            live = [row.live for row in self._rows]
            self._draw_ahead(self._context_event, live, (index, 0))

    def _denoised_block(self, index: int) -> Array:
        """Denoises one block of every live row, [B,S] int64."""
        io, noise, rows, started = self._io, self._noise, self._rows, perf_counter()
        assert noise is not None
        masked = [io.block.shape[1] if row.live else 0 for row in rows]
        for i, row in enumerate(rows):
            io.block[i] = self._work.model.mask_token_id if row.live else self._work.unmasked
            io.context_length[i] = row.length if row.live else 0
        self._work.streams.denoiser.wait(self._context_event)
        steps = max(row.config.steps_per_block for row in rows if row.live)
        for step in range(steps):
            self._hooks.raise_if_cancelled()
            for i, row in enumerate(rows):
                io.commit_floor[i] = commit_floor(masked[i], step, row.config.steps_per_block)
            noise.write(io.noise, masked, block=index, step=step)
            began = perf_counter()
            self._denoiser_event = self._work.denoise()
            if step + 1 < steps:
                self._draw_ahead(
                    self._denoiser_event,
                    masked,
                    (index, step + 1),
                )
            self._denoiser_event.wait_done()
            ms = 1000 * (perf_counter() - began)
            self._check_step(index, step)
            self._record((index, step), masked, ms)
            for i, row in enumerate(rows):
                row.nfe += masked[i] > 0
                row.batch_passes += row.live
            np.copyto(io.block, io.next_block)
            masked = io.masked_left.tolist()
            if not any(masked):
                break
        self._check_block(index)
        self._spend("denoise", started)
        return io.block

    def _next_tokens(self, index: int) -> Array:
        """The next token of every live row from the context tower alone, [B,1] int64."""
        started = perf_counter()
        self._hooks.raise_if_cancelled()
        self._work.head().wait_done()
        for i, row in enumerate(self._rows):
            if row.live:
                ids, logprobs = self._work.candidate_ids[i], self._work.candidate_logprobs[i]
                self._check_candidates(
                    ids,
                    logprobs,
                    f"row {row.index}, token {index}",
                )
                self._next[i] = row.sampling.choose(ids, logprobs, index=index)
                row.nfe += 1
        self._spend("extend", started)
        return self._next

    def _extend(self, tokens: Array) -> None:
        """Lets the context tower read a block, [B,L], of the rows that go on."""
        started, width, work = perf_counter(), tokens.shape[1], self._work
        needed = max(row.length for row in self._rows if row.live) + width
        if needed > work.capacity:
            self._wait()
            work.grow(capacity_bucket(needed, work.largest))
        np.copyto(work.tokens(width), tokens)
        for i, row in enumerate(self._rows):
            # An ended row is written too, though nothing of it is valid: at position 0 it needs no
            # room and nobody reads it again.
            work.past_length[i], work.chunk_length[i] = (row.length, width) if row.live else (0, 0)
            row.length += width * row.live
        work.streams.context.wait(self._denoiser_event)
        self._context_event = work.extend(width)
        self._spend("extend", started)

    def _draw_ahead(self, event: Event, live: Sequence[int], place: tuple[int, int]) -> None:
        """Draws the noise of a block and step, where an engine works meanwhile."""
        assert self._noise is not None
        if event is not HostStream.done:
            self._noise.draw(live, block=place[0], step=place[1])

    def _record(self, place: tuple[int, int], masked: Sequence[int], ms: float) -> None:
        """Tells the caller of a pass, before the next block is fed back."""
        if self._hooks.on_step is None:
            return
        io = self._io
        shown = zip(self._rows, masked, strict=True)
        self._hooks.on_step(
            StepRecord(
                block_index=place[0],
                step=place[1],
                rows=tuple(row.index if left else -1 for row, left in shown),
                block_in=io.block.copy(),
                predicted=io.predicted.copy(),
                confidence=io.confidence.copy(),
                next_block=io.next_block.copy(),
                t=np.asarray(masked, np.float32) / np.float32(io.block.shape[1]),
                ms=ms,
            )
        )

    def _spend(self, what: str, started: float) -> None:
        seconds = perf_counter() - started
        for row in self._rows:
            if row.live:
                row.seconds[what] += seconds

    def _check_step(self, block: int, step: int) -> None:
        """Every confidence of a live row must be a number."""
        if np.isfinite(self._io.confidence).all():
            return
        for row, confidence in zip(self._rows, self._io.confidence, strict=True):
            if row.live and not np.isfinite(confidence).all():
                where = f"row {row.index}, block {block}, step {step}"
                raise _fault(
                    DENOISER,
                    where,
                    f"{CONFIDENCE} {_first_bad(confidence)}",
                )

    def _check_block(self, block: int) -> None:
        """Every token of a complete block must be of the vocabulary, and none a mask."""
        vocab, mask = self._work.model.vocab_size, self._work.model.mask_token_id
        for row, tokens in zip(self._rows, self._io.block, strict=True):
            wrong = (tokens < 0) | (tokens >= vocab) | (tokens == mask)
            if row.live and wrong.any():
                at = int(np.argmax(wrong))
                raise _fault(
                    DENOISER,
                    f"row {row.index}, block {block}",
                    f"{NEXT_BLOCK} holds {int(tokens[at])} at position {at} after the last step "
                    f"(masks are {mask}, the vocabulary ends at {vocab - 1})",
                )

    def _check_candidates(self, ids: Array, logprobs: Array, where: str) -> None:
        """One row's candidates, [K] each; only one that is not the best may be at -inf."""
        vocab = self._work.model.vocab_size
        numbers = np.isfinite(logprobs[0]) and not np.isnan(logprobs).any()
        if not numbers or ids.min() < 0 or ids.max() >= vocab:
            raise _fault(
                CONTEXT,
                where,
                f"{CANDIDATE_LOGPROBS} {_first_bad(logprobs)}; "
                f"tokens {int(ids.min())} to {int(ids.max())} of {vocab}",
            )


def _fault(tower: str, where: str, found: str) -> EngineOutputError:
    return EngineOutputError(
        f"the {tower} engine returned numbers that cannot be right ({where})",
        found=found,
        do="run the request again; if it fails again, build the engine again, or try another "
        "target or a wider dtype (float16 overflows first)",
    )


def _first_bad(values: Array) -> str:
    """The first value that is not finite, with its place; else the first value."""
    at = int(np.argmax(~np.isfinite(values)))
    return f"is {float(values[at])} at position {at}"
