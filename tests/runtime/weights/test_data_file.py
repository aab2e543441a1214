"""A data file gives the bytes asked for, past the page cache or through it, or says why not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.weight_files import record_of
from twotower.bundle import FileRecord
from twotower.errors import BundleError
from twotower.runtime.weights.data_file import DataFile, PageCache
from twotower.runtime.weights.device_layout import Chunk
from twotower.weights.refs import PAGE

Patch = pytest.MonkeyPatch
Open = Callable[..., DataFile]
CONTENT = os.urandom(5 * PAGE + 123)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.onnx.data"
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def data_file(path: Path) -> Iterator[Open]:
    """Opens the file; closing it a second time does nothing."""
    files: list[DataFile] = []

    def open_() -> DataFile:
        files.append(DataFile(path, record_of(path)))
        return files[-1]

    yield open_
    for file in (*files, *files):
        file.close()


def page_aligned(size: int) -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, -(-size // PAGE) * PAGE))


def read(file: DataFile, start: int, stop: int) -> bytes:
    room = page_aligned(stop - start)
    file.read(Chunk(start, stop), room)
    return bytes(room[: stop - start])


@pytest.mark.parametrize("cached", [1.0, 0.0])
@pytest.mark.parametrize("chunk", [(0, PAGE), (PAGE, 4 * PAGE), (4 * PAGE, len(CONTENT)), (0, 100)])
def test_a_chunk_is_read(
    data_file: Open, monkeypatch: Patch, chunk: tuple[int, int], cached: float
) -> None:
    monkeypatch.setattr(PageCache, "share", lambda *_: cached)
    assert read(data_file(), *chunk) == CONTENT[slice(*chunk)]


@pytest.mark.parametrize(("cached", "flag"), [(0.4, os.O_DIRECT), (0.6, 0)])
def test_what_is_not_in_the_page_cache_is_read_past_it(
    data_file: Open, monkeypatch: Patch, cached: float, flag: int
) -> None:
    flags: dict[int, int] = {}
    used: list[int] = []
    really_open, really_read = os.open, os.preadv

    def opened(name: Any, how: int, *rest: Any) -> int:
        handle = really_open(name, how, *rest)
        flags[handle] = how & os.O_DIRECT
        return handle

    def read_all(handle: int, rooms: Any, at: int) -> int:
        used.append(flags[handle])
        return really_read(handle, rooms, at)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read_all)
    monkeypatch.setattr(PageCache, "share", lambda *_: cached)
    read(data_file(), 0, PAGE)
    assert used == [flag]


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_file_system_without_direct_reads(
    data_file: Open, monkeypatch: Patch, where: str
) -> None:
    """It may say so when the file is opened, or not before it is read."""
    really_open, really_read, handles = os.open, os.preadv, set()

    def opened(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT and where == "open":
            raise OSError(errno.EINVAL, "Invalid argument")
        handle = really_open(name, flags, *rest)
        if flags & os.O_DIRECT:
            handles.add(handle)
        return handle

    def read_some(handle: int, rooms: Any, at: int) -> int:
        if handle in handles:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_read(handle, rooms, at)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read_some)
    monkeypatch.setattr(PageCache, "share", lambda *_: 0.0)
    assert read(data_file(), PAGE, 4 * PAGE) == CONTENT[PAGE : 4 * PAGE]


@pytest.mark.parametrize(("cached", "most"), [(1.0, 1000), (0.0, PAGE)])
def test_short_reads_are_gone_on_with(
    data_file: Open, monkeypatch: Patch, cached: float, most: int
) -> None:
    read_all = os.preadv

    def read_some(handle: int, rooms: list[memoryview], at: int) -> int:
        return read_all(handle, [rooms[0][:most]], at)

    monkeypatch.setattr(os, "preadv", read_some)
    monkeypatch.setattr(PageCache, "share", lambda *_: cached)
    assert read(data_file(), 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("cached", [1.0, 0.0])
def test_an_error_of_the_disk_is_told(data_file: Open, monkeypatch: Patch, cached: float) -> None:
    monkeypatch.setattr(PageCache, "share", lambda *_: cached)
    file = data_file()

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(BundleError, match=r"cannot be read\n  found: Input/output error\n  do: "):
        read(file, 0, PAGE)


def test_a_file_that_is_not_there_or_of_another_size(path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        DataFile(path.with_name("other"), FileRecord(1, ""))
    with pytest.raises(BundleError, match=r"20,603 bytes instead of 20,604"):
        DataFile(path, FileRecord(len(CONTENT) + 1, ""))


def test_a_file_that_shrinks_meanwhile(data_file: Open, path: Path) -> None:
    file = data_file()
    os.truncate(path, 2 * PAGE)
    with pytest.raises(BundleError, match=r"ended while it was read\n  found: 8,192 bytes"):
        read(file, PAGE, 4 * PAGE)


def test_a_file_that_changes_meanwhile(data_file: Open, path: Path) -> None:
    file = data_file()
    file.require_unchanged()
    os.utime(path, ns=(0, 0))
    with pytest.raises(BundleError, match="changed while it was read"):
        file.require_unchanged()


def test_content_is_compared_piece_by_piece(data_file: Open) -> None:
    file = data_file()
    file.hash(memoryview(CONTENT)[:1000])
    with pytest.raises(BundleError, match=r"content of .* has changed\n  found: SHA-256 "):
        file.require_content()
    file.hash(memoryview(CONTENT)[1000:])
    file.require_content()
