"""Blocks, steps, prefill chunks and capacities of a generation, in whole numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.spec import MAX_CHUNK

SMALLEST_BUCKET = 256
"""Capacity of the smallest cache; every further bucket doubles it."""

CHUNK_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, MAX_CHUNK)
"""Widths that chunks of prompts are padded to on a device, where each costs a binding."""


def row_counts(most: int) -> tuple[int, ...]:
    """Numbers of rows a batch is padded to on a device: 1, 2, 4, 8, ... and `most`."""
    return (*(1 << n for n in range(most.bit_length()) if 1 << n < most), most)


def commit_floor(masked: int, step: int, steps: int) -> int:
    """Positions to commit in this step (from 0) so that masks are spread over the rest evenly."""
    return -(-masked // max(steps - step, 1))


def block_count(max_new_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens; the last one may be cut."""
    return -(-max_new_tokens // block_size)


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """One pass of the context tower over a right-padded chunk of every row.

    Attributes:
        starts: Where each row's chunk begins in its own prompt; also the tokens it has read so far.
        lengths: Valid tokens in each row's chunk; 0 for a row whose turn has not come.
        width: Columns of the chunk (L): the longest valid length, or the next width engines are
            bound for.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """How prompts are read: the passes, and the `peak` capacity they need.

    A chunk is written whole at its row's start, padding and rows without tokens included.
    """

    steps: tuple[ChunkStep, ...]
    peak: int


def prefill_plan(
    lengths: Sequence[int], max_chunk: int = MAX_CHUNK, widths: Sequence[int] = ()
) -> PrefillPlan:
    """Cuts prompts into chunks that are read side by side.

    A row's chunk boundaries are counted from its own start, so its arithmetic does not depend on
    the rest of the batch. Rows with fewer chunks begin later rather than end sooner: every row's
    last token is then in the last pass, whose `hidden` is what autoregressive decoding goes on
    from, and a row without tokens is always written at position 0, where it needs no capacity.

    Args:
        lengths: Tokens of each prompt, at least 1.
        max_chunk: Longest chunk.
        widths: Widths chunks are padded to, ascending; empty to pad to the longest row only. The
            last admits `max_chunk`.
    """
    assert lengths and min(lengths) > 0 and max_chunk > 0, "prompts are checked before"
    counts = [-(-n // max_chunk) for n in lengths]
    total = max(counts)
    steps = []
    for number in range(total):
        starts = tuple(max(number - (total - count), 0) * max_chunk for count in counts)
        valid = tuple(
            min(max_chunk, n - start) if number >= total - count else 0
            for n, start, count in zip(lengths, starts, counts, strict=True)
        )
        width = max(valid)
        steps.append(
            ChunkStep(
                starts,
                valid,
                next((w for w in widths if w >= width), width),
            )
        )
    return PrefillPlan(tuple(steps), max(max(step.starts) + step.width for step in steps))


def capacity_limit(max_context: int, max_chunk: int = MAX_CHUNK) -> int:
    """Largest capacity a session allocates: its longest text, and a chunk more for padding."""
    return max_context + max_chunk


def capacity_bucket(needed: int, limit: int) -> int:
    """The smallest capacity of 256, 512, 1024, ... `limit` that holds `needed` positions."""
    assert needed <= limit, "lengths are checked before any work"
    size = SMALLEST_BUCKET
    while size < needed:
        size *= 2
    return min(size, limit)
