"""Which mode is faster for a batch: decided from pass times and the passes a block takes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from twotower.config import GenerationConfig

__all__ = [
    "PassTimes",
    "PassesSeen",
    "Setting",
    "break_even",
    "choose",
    "setting_of",
    "times_for",
]

_MOST_BLOCKS = 64
"""The mean is of about so many blocks: a session whose texts change follows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Milliseconds of each pass for one number of rows and one block size.

    Attributes:
        denoise_ms: One denoiser pass over a block.
        extend_ms: The context tower over a finished block.
        step_ms: One autoregressive step: the context tower over one token, and the head.
    """

    denoise_ms: float
    extend_ms: float
    step_ms: float


class Setting(NamedTuple):
    """What decides, besides the text, how many passes a block takes."""

    threshold: float
    steps: int
    block_size: int

    @property
    def most_passes(self) -> int:
        """Passes a block takes at most: each of them commits a position or more."""
        return min(self.steps, self.block_size)


def setting_of(config: GenerationConfig) -> Setting:
    """The setting of a request's options."""
    return Setting(config.confidence_threshold, config.steps_per_block, config.block_size)


def break_even(times: PassTimes, tokens: int) -> float:
    """Passes a block at which both modes take equally long; fewer make diffusion the faster.

    Diffusion spends passes * denoise + extension on a block, autoregression a step on each of its
    tokens.

    Args:
        times: For the batch's rows.
        tokens: Tokens wanted of a block: its size, or fewer where the whole text is shorter.
    """
    return (tokens * times.step_ms - times.extend_ms) / times.denoise_ms


def choose(times: PassTimes, setting: Setting, passes: float | None, *, tokens: int) -> str | None:
    """The faster mode, `diffusion` or `ar`; None where that depends on passes nobody has seen yet.

    Args:
        times: For the batch's rows.
        setting: Its options.
        passes: Passes a block is expected to take; None for unknown.
        tokens: As in `break_even`.
    """
    even = break_even(times, tokens)
    if even < 1:
        return "ar"  # even blocks of a single pass would be slower
    if even >= setting.most_passes:
        return "diffusion"
    if passes is None:
        return None
    return "diffusion" if passes <= even else "ar"


def times_for(table: Mapping[int, PassTimes], rows: int) -> PassTimes:
    """Times for a number of rows: between two measured ones by a straight line, else the nearest.

    Args:
        table: Measured times by number of rows; not empty.
        rows: Rows of the batch.
    """
    below = max((n for n in table if n <= rows), default=min(table))
    above = min((n for n in table if n >= rows), default=max(table))
    if below >= above:
        return table[above]
    low, high, share = table[below], table[above], (rows - below) / (above - below)
    return PassTimes(
        denoise_ms=low.denoise_ms + share * (high.denoise_ms - low.denoise_ms),
        extend_ms=low.extend_ms + share * (high.extend_ms - low.extend_ms),
        step_ms=low.step_ms + share * (high.step_ms - low.step_ms),
    )


class PassesSeen:
    """Mean passes a block, by setting and number of rows.

    A batch runs until its slowest row has no mask left, so more rows take more passes; what is
    not known for a number of rows is taken from the nearest one that is.
    """

    def __init__(self) -> None:
        self._seen: dict[Setting, dict[int, tuple[float, float]]] = {}  # by rows: mean, blocks

    def note(self, setting: Setting, rows: int, *, passes: float, blocks: int) -> None:
        """Adds blocks that took so many passes together."""
        if blocks < 1:
            return
        by_rows = self._seen.setdefault(setting, {})
        mean, count = by_rows.get(rows, (0.0, 0.0))
        kept = min(count, max(_MOST_BLOCKS - blocks, 0))
        by_rows[rows] = ((mean * kept + passes) / (kept + blocks), kept + blocks)

    def expected(self, setting: Setting, rows: int) -> float | None:
        """Passes a block of so many rows; None for a setting that was never seen."""
        by_rows = self._seen.get(setting)
        if not by_rows:
            return None
        return by_rows[min(by_rows, key=lambda n: (abs(n - rows), n))][0]
