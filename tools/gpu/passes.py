"""Passes with fixed inputs, to be run again and again: what sections that time towers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from twotower.runtime.device import Array, Event
from twotower.runtime.engines.towers import Towers
from twotower.runtime.workspace import Workspace
from twotower.spec import CANDIDATE_IDS, CANDIDATE_LOGPROBS, CONTEXT, CONTEXT_HEAD, DENOISER

__all__ = ["ROWS", "WARM", "WIDTHS", "Pass", "capacity_of", "passes"]

ROWS = (1, 8)
"""Of a batch, for each of which every pass is run."""

WIDTHS = {"prefill": 256, "block": 16, "decode": 1}
"""Tokens of a chunk for each use of the context tower."""

TOKENS = 1024
"""Of the text before the block, of every row."""

WARM = 5
"""Runs before any that counts: each of two sets of state is captured on its second."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass to be run again and again.

    Attributes:
        name: What it is called.
        run: Enqueues it; the event comes when it is done.
        outputs: What the host sees of its results, by name: the arrays themselves, which the next
            run overwrites. None of a pass over a chunk, whose results stay on the device.
    """

    name: str
    run: Callable[[], Event]
    outputs: Mapping[str, Array]

    @property
    def finite(self) -> bool | None:
        """Whether all numbers of the last run are finite; None where the host sees none."""
        floats = [array for array in self.outputs.values() if array.dtype.kind == "f"]
        return all(bool(np.isfinite(array).all()) for array in floats) if floats else None


def passes(work: Workspace, towers: Towers, graph: str) -> Iterator[Pass]:
    """The passes of a graph over the state that is there; the same tokens every time.

    Small arrays are filled when a pass is taken from the iterator: run it before the next is taken.
    """
    if graph == DENOISER:
        yield _denoise(work, towers)
    elif graph == CONTEXT_HEAD:
        best = {CANDIDATE_IDS: work.candidate_ids, CANDIDATE_LOGPROBS: work.candidate_logprobs}
        yield Pass("head", work.head, best)
    else:
        assert graph == CONTEXT
        random = np.random.default_rng(0)
        for name, width in WIDTHS.items():
            tokens = work.tokens(width)
            tokens[:] = random.integers(towers.config.vocab_size, size=tokens.shape)
            work.chunk_length.fill(width)
            work.past_length.fill(min(TOKENS, work.capacity - width))
            yield Pass(name, partial(work.extend, width), {})


def capacity_of(towers: Towers) -> int:
    """Positions of keys and values that the engines were built for."""
    assert towers.limits is not None, "TensorRT engines have limits"
    return towers.limits.capacity


def _denoise(work: Workspace, towers: Towers) -> Pass:
    """The first step of a block: all of it is masked, and one position is committed."""
    assert towers.fixed_block is not None
    io = work.denoiser(towers.fixed_block)
    io.block.fill(towers.config.mask_token_id)
    io.context_length.fill(min(TOKENS, work.capacity))
    io.threshold.fill(1.0)
    io.commit_floor.fill(1)
    outputs = {
        "next_block": io.next_block,
        "predicted": io.predicted,
        "confidence": io.confidence,
        "masked_left": io.masked_left,
    }
    return Pass("denoise", work.denoise, outputs)
