"""Mode `auto`: each batch is run in the mode that is expected to take less time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from twotower.config import GenerationConfig
from twotower.errors import RequestError
from twotower.runtime.results import BlockEvent
from twotower.runtime.rows import Row

logger = logging.getLogger(__name__)

_MOST_BLOCKS = 64
"""The mean is of about so many blocks: a session whose texts change follows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Milliseconds of each pass for one number of rows and one block size."""

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
    """Passes a block at which both modes take equally long; diffusion is faster with fewer.

    Diffusion spends passes * denoise + extension on a block, autoregression a step on each of its
    `tokens`: the block size, or fewer where the whole text is shorter.
    """
    return (tokens * times.step_ms - times.extend_ms) / times.denoise_ms


def choose(
    times: PassTimes,
    setting: Setting,
    passes: float | None,
    *,
    tokens: int,
) -> str | None:
    """The faster mode, `diffusion` or `ar`; None if that depends on passes not yet measured."""
    even = break_even(times, tokens)
    if even < 1:
        return "ar"  # even blocks of a single pass would be slower
    if even >= setting.most_passes:
        return "diffusion"
    if passes is None:
        return None
    return "diffusion" if passes <= even else "ar"


def times_for(table: Mapping[int, PassTimes], rows: int) -> PassTimes:
    """Times for a number of rows, of which the table measured some: by a straight line between."""
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

    A batch runs until its slowest row has no mask left, so more rows take more passes. An unknown
    number of rows takes the nearest known one's value.
    """

    def __init__(self) -> None:
        self._seen: dict[Setting, dict[int, tuple[float, float]]] = {}  # by rows: mean, blocks

    def note(
        self,
        setting: Setting,
        rows: int,
        *,
        passes: float,
        blocks: int,
    ) -> None:
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
        nearest = min(by_rows, key=lambda n: (abs(n - rows), n))
        return by_rows[nearest][0]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What is known of passes before a session has run any.

    Attributes:
        measured_on: Engines, library, machine and options of the measurement, as plain data.
        passes: Blocks and passes of single requests, by setting: (passes a block, blocks).
    """

    measured_on: Mapping[str, Any]
    times: dict[int, dict[int, PassTimes]] = field(default_factory=dict)
    passes: dict[Setting, tuple[float, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `read_pass_record` reads back."""
        times: list[dict[str, Any]] = []
        for size, by_rows in self.times.items():
            times += [{"block_size": size, "rows": n, **asdict(t)} for n, t in by_rows.items()]
        passes: list[dict[str, Any]] = []
        for setting, (mean, blocks) in self.passes.items():
            passes.append({**setting._asdict(), "passes_per_block": mean, "blocks": blocks})
        return {"measured_on": dict(self.measured_on), "times": times, "passes": passes}


class AutoMode:
    """Decides for batches of one setting, and learns from those that ran by diffusion."""

    def __init__(self, measure: Callable[[int, int], PassTimes]) -> None:
        self._measure = measure
        self._record = PassRecord({})
        self._measured: dict[tuple[int, int], PassTimes] = {}
        self._seen = PassesSeen()

    def start_from(self, record: PassRecord) -> None:
        """Takes over what was measured on this machine before."""
        self._record = record
        for setting, (mean, blocks) in record.passes.items():
            self._seen.note(setting, 1, passes=mean * blocks, blocks=blocks)

    def record(self, row_counts: Sequence[int], block_size: int) -> PassRecord:
        """Measures anew, for each number of rows up to the first that does not fit the memory."""
        times: dict[int, PassTimes] = {}
        for rows in row_counts:
            try:
                times[rows] = self._measure(rows, block_size)
            except RequestError as e:
                logger.warning("passes of %d rows are not measured: %s", rows, e.found)
                break
        return PassRecord(self._record.measured_on, {block_size: times})

    def events(
        self,
        rows: Sequence[Row],
        run: Callable[[Sequence[Row]], Generator[BlockEvent, None, None]],
    ) -> Iterator[BlockEvent]:
        """The events of a batch in the mode that is chosen for it.

        Where the passes of its setting are unknown and matter, a first block is denoised. If
        autoregression turns out to be faster, that block is dropped and the batch begun again.
        """
        mode = self._choice(rows)
        settled = [row.in_mode(mode or "diffusion") for row in rows]
        events = run(settled)
        known = 0, 0
        if mode is None:
            first = next(events)
            known = self._learn(settled, known)
            if self._choice(rows) == "ar" and any(row.live for row in settled):
                events.close()
                yield from run([row.in_mode("ar") for row in rows])
                return
            yield first
        yield from events
        self._learn(settled, known)

    def times(self, rows: int, block_size: int) -> PassTimes:
        """Pass times: the record's, or else measured once for each number of rows."""
        recorded = self._record.times.get(block_size)
        if recorded:
            return times_for(recorded, rows)
        key = rows, block_size
        if key not in self._measured:
            self._measured[key] = self._measure(rows, block_size)
        return self._measured[key]

    def _choice(self, rows: Sequence[Row]) -> str | None:
        setting = setting_of(rows[0].config)
        tokens = min(setting.block_size, max(row.config.max_new_tokens for row in rows))
        times = self.times(len(rows), setting.block_size)
        passes = self._seen.expected(setting, len(rows))
        mode = choose(times, setting, passes, tokens=tokens)
        logger.info(
            "auto: %s for %d row(s); passes a block %s, both modes are equal at %.2f",
            mode or "a first block by diffusion",
            len(rows),
            "unknown" if passes is None else f"{passes:.2f}",
            break_even(times, tokens),
        )
        return mode

    def _learn(self, rows: Sequence[Row], known: tuple[int, int]) -> tuple[int, int]:
        """Notes the blocks since the last time; returns (passes, blocks) that are noted now."""
        passes, blocks = max(row.batch_passes for row in rows), max(row.blocks for row in rows)
        new = blocks - known[1]
        setting = setting_of(rows[0].config)
        self._seen.note(
            setting,
            len(rows),
            passes=passes - known[0],
            blocks=new,
        )
        return passes, blocks
