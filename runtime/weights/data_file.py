"""A bundle's data file while several threads read it, and its part in the page cache."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twotower.bundle import FileRecord
from twotower.errors import BundleError
from twotower.runtime.weights.device_layout import Chunk
from twotower.weights.refs import PAGE, WeightRef

logger = logging.getLogger(__name__)

_COPY_AGAIN = "copy the bundle again from where it was made, or export the checkpoint again"


class DataFile:
    """An open data file; what is not in the page cache is read past it, where that can be done.

    That spares a copy, and does not drop what other programs have there.

    Raises:
        BundleError: it cannot be opened, or is not of the recorded size.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path, self.record = path, record
        self._digest = hashlib.sha256()
        self._direct: int | None = None
        self._cache: PageCache | None = None
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise self._unreadable(e) from e
        try:
            self._stamp = self._stat()
            self._require_size()
            self._direct = self._opened_directly()
            self._cache = PageCache(self._file, record.size)
        except BaseException:
            self.close()
            raise

    def require_within(self, weights: Mapping[str, WeightRef]) -> None:
        """Refuses, by BundleError, weights that end behind the end of the file."""
        for name, weight in weights.items():
            if weight.end > self.record.size:
                raise BundleError(
                    f"{self.path} is shorter than the table of its weights",
                    found=f"{name} ends at byte {weight.end:,}, the file at {self.record.size:,}",
                    do=_COPY_AGAIN,
                )

    def read(self, chunk: Chunk, into: memoryview) -> None:
        """Reads a chunk into a buffer rounded up to a multiple of `PAGE`; thread-safe."""
        at = chunk.start
        if self._direct is not None and not self._cached(chunk):
            at += self._read_directly(chunk, into)
        while at < chunk.stop:
            room = into[at - chunk.start : chunk.stop - chunk.start]
            try:
                count = os.preadv(self._file, [room], at)
            except OSError as e:
                raise self._unreadable(e) from e
            if count == 0:
                raise BundleError(
                    f"{self.path} ended while it was read",
                    found=f"{at:,} bytes instead of {self.record.size:,}: a program shortens it",
                    do=_COPY_AGAIN,
                )
            at += count

    def hash(self, data: memoryview) -> None:
        """Goes on hashing; the pieces come in the order of the file."""
        self._digest.update(data)

    def require_content(self) -> None:
        """Compares the hash of all pieces with the recorded one; BundleError if not equal."""
        found = self._digest.hexdigest()
        if found != self.record.sha256:
            raise BundleError(
                f"the content of {self.path} has changed",
                found=f"SHA-256 {found[:16]}... instead of {self.record.sha256[:16]}...",
                do=_COPY_AGAIN,
            )

    def require_unchanged(self) -> None:
        """Raises BundleError if the file was written to since it was opened."""
        if self._stat() != self._stamp:
            raise BundleError(
                f"{self.path} changed while it was read",
                found="another size or time of change than at the beginning",
                do="end the program that writes to the bundle, and open it again",
            )

    def close(self) -> None:
        """Closes the file; idempotent, and nothing may be reading."""
        for handle in (self._file, self._direct):
            if handle is not None and handle >= 0:
                os.close(handle)
        self._file, self._direct = -1, None
        if self._cache is not None:
            self._cache.close()

    def _require_size(self) -> None:
        size = self._stamp[0]
        if size != self.record.size:
            found = f"{size:,} bytes instead of {self.record.size:,}"
            what = f"{self.path} is not as long as bundle.json says"
            raise BundleError(what, found=found, do=_COPY_AGAIN)

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file)
        return stat.st_size, stat.st_mtime_ns

    def _opened_directly(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as e:
            logger.info("%s is read by way of the page cache: %s", self.path, e.strerror)
            return None

    def _cached(self, chunk: Chunk) -> bool:
        """Whether reading by way of the page cache is the shorter way."""
        return self._cache is not None and self._cache.share(chunk.start, chunk.stop) > 0.5

    def _read_directly(self, chunk: Chunk, into: memoryview) -> int:
        """Bytes read past the page cache; the rest, if there is one, is read through it."""
        assert self._direct is not None
        size = chunk.stop - chunk.start
        room = into[: -(-size // PAGE) * PAGE]
        try:
            return min(os.preadv(self._direct, [room], chunk.start), size)
        except OSError as e:
            if e.errno == errno.EINVAL:  # some file systems open a file so and do not read it so
                return 0
            raise self._unreadable(e) from e

    def _unreadable(self, e: OSError) -> BundleError:
        do = _COPY_AGAIN
        if not isinstance(e, FileNotFoundError):
            do = f"look at its permissions and at the disk (`dmesg`), or {do}"
        return BundleError(
            f"{self.path} cannot be read",
            found=e.strerror or str(e),
            do=do,
        )


class PageCache:
    """The page cache's part of one open file, which is mapped for that and never touched.

    Where the system cannot tell (a file system without mappings, pages of another size), everything
    counts as cached: it is then read in the usual way.
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
        """Share of bytes [start, stop) in the cache, from 0 to 1; thread-safe.

        The kernel tells only who owns the file or may write to it, and says 1 to others.
        """
        if self._map is None or stop <= start:
            return 1.0
        start = start // mmap.PAGESIZE * mmap.PAGESIZE
        pages = np.empty(-(-(stop - start) // mmap.PAGESIZE), np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        if mincore(
            self._start + start,
            stop - start,
            pages.ctypes.data,
        ):
            logger.debug("mincore: %s", os.strerror(ctypes.get_errno()))
            return 1.0
        return float((pages & 1).mean())

    def close(self) -> None:
        """Unmaps the file; idempotent."""
        mapped, self._map = self._map, None
        if mapped is not None:
            mapped.close()
