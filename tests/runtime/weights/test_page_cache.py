"""The kernel says what of a file it holds in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from twotower.runtime.weights.data_file import PageCache
from twotower.weights.refs import PAGE


def test_what_was_written_is_there_and_a_hole_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * PAGE))
    os.truncate(path, 9 * PAGE + 100)
    handle = os.open(path, os.O_RDONLY)
    cache = PageCache(handle, 9 * PAGE + 100)
    os.close(handle)
    assert cache.share(0, 3 * PAGE) == 1.0
    assert cache.share(4 * PAGE, 9 * PAGE + 100) == 0.0
    assert cache.share(2 * PAGE, 4 * PAGE) == pytest.approx(0.5)
    cache.close()
    cache.close()


def test_an_empty_file_has_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    handle = os.open(tmp_path / "file", os.O_RDONLY)
    cache = PageCache(handle, 0)
    os.close(handle)
    assert cache.share(0, 0) == 1.0
    cache.close()


def test_where_the_system_cannot_tell_everything_counts_as_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    os.truncate(path, 8 * PAGE)
    handle = os.open(path, os.O_RDONLY)
    sound = PageCache(handle, 8 * PAGE)
    assert sound.share(5 * PAGE + 64, 8 * PAGE) < 1, "a start inside a page is that page's"
    sound._start += 1  # the kernel refuses an address that is no page's
    assert sound.share(4 * PAGE, 8 * PAGE) == 1.0

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr("mmap.mmap", refused)
    assert PageCache(handle, 8 * PAGE).share(4 * PAGE, 8 * PAGE) == 1.0
    os.close(handle)
