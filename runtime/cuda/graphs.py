"""Capture of a pass as a CUDA graph: one launch instead of a thousand."""

from __future__ import annotations

import logging
from collections.abc import Callable

from twotower.errors import DeviceError
from twotower.runtime.cuda.calls import Cuda, CudaError

logger = logging.getLogger(__name__)


def capture(
    cuda: Cuda,
    stream: int,
    enqueue: Callable[[], None],
    *,
    name: str,
) -> int | None:
    """Captures what `enqueue` puts on a stream; None, logged, if it cannot be captured.

    `enqueue` has already run once, to completion, with the same addresses and shapes. It raises
    `DeviceError` where a library refuses: that library records nothing, and the graph would replay
    whatever the buffers held before.
    """
    try:
        return cuda.instantiate(_recorded(cuda, stream, enqueue))
    except DeviceError as e:
        if isinstance(e, CudaError) and e.lasting:
            raise
        cuda.forget_error()  # a broken capture leaves its error behind for whoever asks next
        logger.warning(
            "%s cannot be captured as a CUDA graph and is launched piece by piece: %s (%s)",
            name,
            e.what,
            e.found,
        )
        return None


def _recorded(cuda: Cuda, stream: int, enqueue: Callable[[], None]) -> int:
    """The captured graph. The capture always ends: a stream that stays in one is lost."""
    cuda.begin_capture(stream)
    try:
        enqueue()
    except BaseException:  # whatever it is, a stream that stays in a capture helps nobody
        try:
            cuda.drop_graph(cuda.end_capture(stream))
        except DeviceError as e:
            logger.debug("the end of a refused capture: %s", e.found)
        raise
    graph = cuda.end_capture(stream)
    if not graph:
        raise DeviceError(
            "a capture recorded nothing",
            found="no graph at its end",
            do="report this: it is a defect of twotower",
        )
    return graph
