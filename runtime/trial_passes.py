"""Every pass of a session run on scratch rows: to have it done once, and to time it for mode `auto`.

What a library does in a shape's first run is then done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import numpy as np

from twotower.config import ModelConfig
from twotower.runtime.auto import PassTimes
from twotower.runtime.device import Streams
from twotower.runtime.workspace import Workspace

__all__ = ["FIRST", "RUNS", "measure_pass_times", "run_every_pass"]

RUNS = 3
"""Passes of each kind that count."""

FIRST = 2
"""Passes before them that do not: engines bind each of the two sets of Mamba states in them."""


def measure_pass_times(
    work: Workspace,
    config: ModelConfig,
    *,
    block_size: int,
    streams: Streams,
) -> PassTimes:
    """Medians of three passes of each kind, by wall clock around work that is waited for.

    Rows hold random words, since how many experts a layer computes depends on its tokens: padding
    would be too fast. The context is a block long, so the reading of long caches is not in it.

    Args:
        work: Buffers with room for `block_size` + 1 positions, of which nothing is kept; they
            must be cleared before they are used.
        config: The model.
        block_size: S.
        streams: The towers' queues.
    """
    special = [config.mask_token_id, *config.eos_token_ids]
    words = np.setdiff1d(np.arange(config.vocab_size), special)
    rows, rng = len(work.past_length), np.random.default_rng(0)
    tokens = rng.choice(words, (rows, block_size))
    arrays = work.denoiser(block_size)

    def read(past: int, width: int) -> None:
        work.past_length[:], work.chunk_length[:] = past, width
        work.tokens(width)[:] = tokens[:, :width]
        work.extend(width, streams.context).wait_done()

    def extend() -> None:
        read(0, block_size)

    def denoise() -> None:
        arrays.block[:] = tokens
        arrays.block[:, ::2] = config.mask_token_id  # a block half done
        arrays.context_length[:], arrays.commit_floor[:] = block_size, 1
        arrays.threshold[:], arrays.temperature[:], arrays.noise[:] = 1, 0, 0
        work.denoise(streams.denoiser).wait_done()

    def step() -> None:
        read(block_size, 1)
        work.head(streams.context).wait_done()

    return PassTimes(
        extend_ms=_milliseconds(extend),
        denoise_ms=_milliseconds(denoise),
        step_ms=_milliseconds(step),
    )


def _milliseconds(run: Callable[[], None]) -> float:
    """One kind in a row, as steps and denoiser passes come: another would empty the caches."""
    seconds = []
    for _ in range(FIRST + RUNS):
        started = perf_counter()
        run()
        seconds.append(perf_counter() - started)
    return 1000 * median(seconds[FIRST:])


_SETS = 2  # of Mamba states: each has bindings of its own


def run_every_pass(
    work: Workspace,
    *,
    widths: Sequence[int],
    block_size: int,
    streams: Streams,
) -> None:
    """Runs the context tower over chunks, the denoiser over a block, and the head.

    Args:
        work: Buffers, of which nothing is kept; they must be cleared before they are used.
        widths: Columns of the chunks.
        block_size: S.
        streams: The towers' queues.
    """
    for width in dict.fromkeys(widths):
        for _ in range(_SETS):
            _read(work, width, streams)
    arrays = work.denoiser(block_size)
    for _ in range(_SETS):
        arrays.use(0, unmasked=work.unmasked)
        work.denoise(streams.denoiser).wait_done()
        _read(work, 1, streams)
    work.head(streams.context).wait_done()


def _read(work: Workspace, width: int, streams: Streams) -> None:
    """A chunk without a valid token: the state stays as it is."""
    work.past_length[:] = work.chunk_length[:] = 0
    work.tokens(width).fill(0)
    work.extend(width, streams.context).wait_done()
