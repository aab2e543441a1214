"""Files and folders: hashed, kept inside a root, locked, written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import importlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from twotower.errors import TwoTowerError
from twotower.units import format_bytes

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_CHUNK = 8 << 20
_AT_ONCE = 4  # files: SHA-256 of one is a chain, which more threads do not make faster


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, tick: Callable[[int], None] | None = None) -> FileRecord:
        """The record of a file as it is now; `tick` gets the bytes of each piece read."""
        return cls(path.stat().st_size, hash_file(path, tick))


def byte_counter(
    report: Callable[[str, int, int], None], what: str, total: int
) -> Callable[[int], None]:
    """A `tick` that adds up and reports (what, bytes done, bytes in all)."""
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        report(what, done, total)

    return tick


def hash_file(path: Path, tick: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in bounded pieces; `tick` gets the bytes of each."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if tick:
                tick(count)
    return digest.hexdigest()


def file_records(
    folder: Path, known: Mapping[str, FileRecord] | None = None
) -> dict[str, FileRecord]:
    """Every file below a folder by its path in it, hashed unless its record is known."""
    out = dict(known or {})
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in out:
            out[name] = FileRecord.of(path)
    return dict(sorted(out.items()))


def hash_files(paths: Sequence[Path], tick: Callable[[int], None] | None = None) -> list[str]:
    """SHA-256 of every file, up to four at a time; `tick` gets the bytes of each piece, serially.

    OSError if a file cannot be read; the hashing of the others ends first.
    """
    lock, ended = threading.Lock(), threading.Event()

    def told(count: int) -> None:
        if ended.is_set():  # an error or Ctrl-C: nobody waits for gigabytes that nobody wants
            raise _EndedError
        if tick:
            with lock:
                tick(count)

    with ThreadPoolExecutor(_AT_ONCE, "hash-files") as pool:
        hashing = [pool.submit(hash_file, path, told) for path in paths]
        try:
            done, _ = wait(hashing, return_when=FIRST_EXCEPTION)
            for one in done:
                one.result()
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return [one.result() for one in hashing]


class _EndedError(Exception):
    """Hashing goes on for nobody."""


def inside(root: Path, relative: str) -> Path | None:
    """The path of a file below `root`; None for one that leads out of it, or that is a link out."""
    pure = PurePosixPath(relative)
    if (
        not relative
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in relative
        or ":" in relative
    ):
        return None
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        return None
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its place if the block succeeds and is removed if not.

    Its name is the process's own: of several that write one file the last one counts, whole.
    """
    partial = _own_name(path, f".{path.name}.")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | bytearray | memoryview | str) -> None:
    """Writes a file, text in UTF-8, so that it appears whole or not at all.

    OSError if the disk is full or fails; what was there before still is.
    """
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_output(path: Path, data: bytes | str, *, error: type[TwoTowerError]) -> None:
    """Writes a file that a user asked for, whole, and the folder it is in; `error` if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as e:
        raise _no_output(path, str(e), error) from e


def require_place(path: Path, *, error: type[TwoTowerError]) -> None:
    """Refuses, before the work, a file to write that is a folder or lies in none."""
    if path.is_dir():
        raise _no_output(path, "it is a folder", error)
    if not path.parent.is_dir():
        raise _no_output(path, f"there is no folder {path.parent}", error)


def _no_output(path: Path, found: str, error: type[TwoTowerError]) -> TwoTowerError:
    do = "name a file in a folder that exists, can be written and has room"
    return error(f"cannot write {path}", found=found, do=do)


logger = logging.getLogger(__name__)

_SLACK_BYTES = 64 << 20  # graphs, manifest, tokenizer and the file system's own needs


@contextmanager
def unpublished(output: Path) -> Iterator[Path]:
    """A hidden folder that becomes `output` if the block succeeds and is removed if not.

    What killed processes left behind under that name is removed, but not what a living one writes.
    """
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = _own_name(output.absolute(), f".{output.name}.partial.")
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_new(output: Path, *, error: type[TwoTowerError]) -> None:
    """Refuses a folder that exists, with an error of a class."""
    if output.exists() or output.is_symlink():
        raise error(
            f"the output folder '{output}' exists already",
            found="a bundle is never overwritten",
            do="name a new folder with -o, or remove that one",
        )


def require_room(
    output: Path,
    nbytes: int,
    *,
    error: type[TwoTowerError],
    smaller: str,
) -> None:
    """Refuses a folder that exists, and a disk without room for so many bytes and some more.

    `error` is the class to raise; `smaller` says what to do other than free space.
    """
    require_new(output, error=error)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = nbytes + _SLACK_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise error(
            f"not enough disk space for '{output}'",
            found=f"{format_bytes(needed)} needed, {format_bytes(free)} free on {parent}",
            do=f"free space, {smaller}",
        )


def link_file(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy where there are no links."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _own_name(path: Path, stem: str) -> Path:
    """A hidden name beside `path` for this process; removes what killed processes left there."""
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        owner = left.name.removeprefix(stem)
        if owner.isdigit() and not _alive(int(owner)):
            logger.info("removing %s, left by a killed process", left)
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        pass
    return True


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which is made if it is not there and stays.

    `waiting` is called once if another process holds it. OSError if the file cannot be made.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # Windows: a build there is protected by its renames alone
        yield
        return
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
