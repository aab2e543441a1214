"""What a caller may watch while text is generated, and how it stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twotower.runtime.buffers import DenoiserArrays
from twotower.runtime.memory import Array
from twotower.runtime.results import RequestCancelledError

__all__ = ["Hooks", "StepRecord", "step_record"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One denoiser pass as it went in and came out, copied for the caller.

    Attributes:
        block_index: Number of the block in the rows' texts.
        step: Number of the step in the block.
        rows: For each of the B rows, the number of its request in the call, or -1 where nothing was masked any more.
        block_in: [B,S] int64 before the pass, and
        next_block: [B,S] int64 after it.
        predicted: [B,S] int64.
        confidence: [B,S] float32.
        t: [B] float32, the masked fraction of each row's block.
        ms: Wall-clock milliseconds of the pass, waiting for its result included.
    """

    block_index: int
    step: int
    rows: tuple[int, ...]
    block_in: Array
    predicted: Array
    confidence: Array
    next_block: Array
    t: Array
    ms: float


@dataclass(frozen=True, slots=True)
class Hooks:
    """Callbacks of one call; they run between passes, in the caller's thread.

    Attributes:
        on_step: Called after every denoiser pass.
        on_prefill: Called with (tokens read, tokens to read) of a batch's prompts, after every chunk.
        cancelled: Asked before every pass; True ends the call with a `RequestCancelledError`.
    """

    on_step: Callable[[StepRecord], None] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] | None = None

    def raise_if_cancelled(self) -> None:
        """Ends the call if the caller wants it ended."""
        if self.cancelled is not None and self.cancelled():
            raise RequestCancelledError(
                "the request was cancelled", found="`cancelled` returned True between two passes", do="nothing: the session can be used on"
            )


def step_record(arrays: DenoiserArrays, rows: tuple[int, ...], masked: Sequence[int], *, place: tuple[int, int], ms: float) -> StepRecord:
    """A copy of what the denoiser read and wrote.

    Args:
        arrays: Its small arrays, after the pass and before the next block is fed back.
        rows: As in the record.
        masked: Masks each row had before the pass.
        place: Number of the block and of the step.
        ms: Milliseconds that the pass took.
    """
    return StepRecord(
        block_index=place[0],
        step=place[1],
        rows=rows,
        block_in=arrays.block.copy(),
        predicted=arrays.predicted.copy(),
        confidence=arrays.confidence.copy(),
        next_block=arrays.next_block.copy(),
        t=np.asarray(masked, np.float32) / np.float32(arrays.block.shape[1]),
        ms=ms,
    )
