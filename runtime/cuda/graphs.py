"""Capture of a pass as a CUDA graph: one launch instead of a thousand."""

from __future__ import annotations

import logging
from collections.abc import Callable

from twotower.errors import DeviceError
from twotower.runtime.cuda.calls import Cuda, CudaError

logger = logging.getLogger(__name__)


def capture(cuda: Cuda, stream: int, enqueue: Callable[[], None], *, name: str) -> int | None:
    """Records what `enqueue` puts on a stream, without running it.

    Args:
        cuda: The calls.
        stream: A stream of the current device.
        enqueue: Has run once with the same addresses and shapes, outside any capture, and that work
            is done. Raises `DeviceError` where a library refuses: such a library records nothing,
            and the graph would replay whatever the buffers held before.
        name: What it is, for the log.

    Returns:
        The graph ready to launch, or None, said in the log, where the work cannot be captured.
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
