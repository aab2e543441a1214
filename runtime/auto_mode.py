"""Mode `auto` in a session: each batch is run in the mode that is expected to take less time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from twotower.errors import RequestError
from twotower.runtime.auto import PassesSeen, PassTimes, break_even, choose, setting_of, times_for
from twotower.runtime.pass_times import PassRecord
from twotower.runtime.requests import Limits
from twotower.runtime.results import BlockEvent
from twotower.runtime.rows import Row

__all__ = ["AutoMode"]

logger = logging.getLogger(__name__)


class AutoMode:
    """Decides for batches of one setting, and learns from those that ran by diffusion.

    Args:
        limits: What the session can serve.
        measure: Measures the passes of a number of rows and a block size.
    """

    def __init__(self, limits: Limits, measure: Callable[[int, int], PassTimes]) -> None:
        self._limits = limits
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
    ) -> Generator[BlockEvent, None, None]:
        """The events of a batch in the mode that is chosen for it.

        Where the passes of its setting are unknown and matter, a first block is denoised. If
        autoregression turns out to be faster, that block is dropped and the batch begun again.

        Args:
            rows: Requests in mode `auto`, of one setting.
            run: Generates for rows of one mode.
        """
        mode = self._choice(rows)
        settled = self._in_mode(rows, mode or "diffusion")
        events = run(settled)
        known = 0, 0
        if mode is None:
            first = next(events)
            known = self._learn(settled, known)
            if self._choice(rows) == "ar" and any(row.live for row in settled):
                events.close()
                yield from run(self._in_mode(rows, "ar"))
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
        setting, tokens = setting_of(rows[0].config), _tokens(rows)
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

    def _in_mode(self, rows: Sequence[Row], mode: str) -> list[Row]:
        model, tokenizer = self._limits.model, self._limits.tokenizer
        return [
            Row(
                row.index,
                row.prompt.tolist(),
                replace(row.config, mode=mode),
                model=model,
                tokenizer=tokenizer,
            )
            for row in rows
        ]

    def _learn(self, rows: Sequence[Row], known: tuple[int, int]) -> tuple[int, int]:
        """Notes the blocks since the last time; returns (passes, blocks) that are noted now."""
        passes, blocks = max(row.batch_passes for row in rows), max(row.blocks for row in rows)
        new = blocks - known[1]
        setting = setting_of(rows[0].config)
        self._seen.note(setting, len(rows), passes=passes - known[0], blocks=new)
        return passes, blocks


def _tokens(rows: Sequence[Row]) -> int:
    longest = max(row.config.max_new_tokens for row in rows)
    return min(rows[0].config.block_size, longest)
