"""Every pass of a session run on padding alone: what a library does in a shape's first run is then done."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.runtime.streams import Streams
from twotower.runtime.workspace import Workspace

__all__ = ["run_every_pass"]

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
