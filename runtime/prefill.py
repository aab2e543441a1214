"""Reading prompts: chunk by chunk, all rows side by side."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from twotower.runtime.rows import Row
from twotower.runtime.schedule import PrefillPlan
from twotower.runtime.settings import LoopSettings
from twotower.runtime.streams import Event, HostStream
from twotower.runtime.workspace import Workspace

__all__ = ["prefill"]


def prefill(work: Workspace, rows: Sequence[Row], plan: PrefillPlan, settings: LoopSettings) -> Event:
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
