"""What of a file is in the kernel's page cache, without reading it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from typing import Any

import numpy as np

__all__ = ["PageCache"]

logger = logging.getLogger(__name__)


class PageCache:
    """The page cache's part of one open file, which is mapped for that and never touched.

    Where the system cannot tell (a file system without mappings, pages of another size), everything
    counts as cached: it is then read in the usual way.

    Args:
        handle: The file, which may be closed meanwhile.
        size: Its bytes.
    """

    def __init__(self, handle: int, size: int) -> None:
        self._map: mmap.mmap | None = None
        if size:
            try:
                self._map = mmap.mmap(handle, size, prot=mmap.PROT_READ)
            except OSError as e:
                logger.debug("what is in the page cache cannot be told: %s", e)
        view: Any = None if self._map is None else np.frombuffer(self._map, np.uint8)
        self._start = 0 if view is None else int(view.ctypes.data)

    def share(self, start: int, stop: int) -> float:
        """The part of bytes [start, stop) that is there, from 0 to 1; any thread may ask.

        The kernel tells only who owns the file or may write to it, and says 1 to others.

        Args:
            start: First byte.
            stop: Up to the end of the file.
        """
        if self._map is None or stop <= start:
            return 1.0
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages = np.empty(-(-(stop - start) // mmap.PAGESIZE), np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        if mincore(self._start + start, stop - start, pages.ctypes.data):
            logger.debug("mincore: %s", os.strerror(ctypes.get_errno()))
            return 1.0
        return float((pages & 1).mean())

    def close(self) -> None:
        """Unmaps the file; idempotent."""
        mapped, self._map = self._map, None
        if mapped is not None:
            mapped.close()
