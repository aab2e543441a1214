"""The integers of generation: how many positions to commit, how a prompt is cut into chunks, how much cache that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.spec import MAX_CHUNK

__all__ = ["SMALLEST_BUCKET", "PrefillStep", "capacity_bucket", "commit_floor", "plan_prefill", "prefill_peak", "text_end"]

SMALLEST_BUCKET = 256


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One run of the context graph over the prompts of a batch.

    Attributes:
        starts: For each row, tokens read before.
        counts: For each row, tokens read now; 0 for a row that is through.
        width: Length of the padded chunk.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    width: int


def commit_floor(masked: int, step: int, steps: int) -> int:
    """The fewest positions to commit so that `masked` positions are done by the last of `steps` (counted from 0)."""
    return -(-masked // max(steps - step, 1))


def plan_prefill(lengths: Sequence[int], chunk: int = MAX_CHUNK) -> list[PrefillStep]:
    """Cuts prompts of any mix of lengths into padded chunks.

    A row's chunks are counted from its own start, whoever else is in the batch, so that its arithmetic is the same in any company.
    """
    steps = []
    for start in range(0, max(lengths), chunk):
        starts = tuple(min(n, start) for n in lengths)
        counts = tuple(min(max(n - start, 0), chunk) for n in lengths)
        steps.append(PrefillStep(starts, counts, max(counts)))
    return steps


def prefill_peak(plan: Sequence[PrefillStep]) -> int:
    """Cache slots a prefill writes, padding included: a padded chunk is written whole, also for rows that are through."""
    return max(start + step.width for step in plan for start in step.starts)


def text_end(prompt: int, max_new_tokens: int, block: int) -> int:
    """Cache slots a text can come to fill: the last block is never read by the context tower."""
    blocks = -(-max_new_tokens // block)
    return prompt + (blocks - 1) * block


def capacity_bucket(slots: int) -> int:
    """The cache capacity for so many slots: 256, 512, 1024, ... A short text does not pay for a long cache."""
    bucket = SMALLEST_BUCKET
    while bucket < slots:
        bucket *= 2
    return bucket
