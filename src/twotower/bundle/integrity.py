"""Whether the files of a folder are the ones it says it holds; a file is read once and then trusted until it changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = [
    "FileRecord",
    "Progress",
    "check_files",
    "file_records",
    "hash_file",
    "hash_files",
    "inside",
    "remember_files",
    "unverified_files",
]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_CHUNK = 8 << 20
_AT_ONCE = 4  # files: SHA-256 of one is a chain, which more threads do not make faster
_SETTLED_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


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


def file_records(folder: Path) -> dict[str, FileRecord]:
    """Every file of a folder, hashed, by name."""
    return {path.name: FileRecord(path.stat().st_size, hash_file(path)) for path in sorted(folder.iterdir())}


def hash_files(paths: Sequence[Path], tick: Callable[[int], None] | None = None) -> list[str]:
    """SHA-256 of every file, up to four of them at the same time.

    Args:
        paths: The files.
        tick: Called with the bytes of each piece, in one thread at a time.

    Raises:
        OSError: a file cannot be read; the hashing of the others ends first.
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
    """The path of a file below `root`, or None for one that leads out of it (also by way of a link)."""
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or ":" in relative:
        return None
    path = root / pure
    return path if path.resolve().is_relative_to(root.resolve()) else None


def check_files(root: Path, records: Mapping[str, FileRecord], progress: Progress | None = None) -> list[str]:
    """Everything wrong with the files under `root`: missing, leading out of it, of another size or content.

    Contents are hashed, four files at a time, the first time; the result is remembered for the user with the file's
    identity (size, times, inode), so that opening the same unchanged bundle again only looks at the directory.
    """
    problems: list[str] = []
    to_hash: list[tuple[str, Path, FileRecord]] = []
    remembered = _Remembered()
    for name, record in sorted(records.items()):
        path = inside(root, name)
        if path is None:
            problems.append(f"{name}: leads out of the folder")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif (size := path.stat().st_size) != record.size:
            problems.append(f"{name}: {size} bytes instead of {record.size}")
        elif not remembered.knows(path, record):
            to_hash.append((name, path, record))
    total, done = sum(record.size for _, _, record in to_hash), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    found = hash_files([path for _, path, _ in to_hash], tick)
    for (name, path, record), sha256 in zip(to_hash, found, strict=True):
        if sha256 == record.sha256:
            remembered.add(path, record)
        else:
            problems.append(f"{name}: its content has changed (SHA-256 differs)")
    remembered.save()
    return problems


def unverified_files(root: Path, records: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Those of the files whose content this user has not compared with its SHA-256 since they last changed."""
    remembered = _Remembered()
    return {name: record for name, record in records.items() if not remembered.knows(root / name, record)}


def remember_files(root: Path, records: Mapping[str, FileRecord]) -> None:
    """Notes that the content of these files was compared with its SHA-256: by who read them for another purpose."""
    remembered = _Remembered()
    for name, record in records.items():
        remembered.add(root / name, record)
    remembered.save()


class _Remembered:
    """Files already hashed by this user, by absolute path. Losing this file costs time, never correctness."""

    _LIMIT = 1000

    def __init__(self) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self._file = Path(base) / "twotower" / "verified.json"
        self._changed = False
        try:
            self._known = {str(k): list(v) for k, v in json.loads(self._file.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._known = {}

    def knows(self, path: Path, record: FileRecord) -> bool:
        return self._known.get(str(path.resolve())) == _stamp(path, record)

    def add(self, path: Path, record: FileRecord) -> None:
        # A file changed within the clock's tick of its stamp would keep the stamp: only settled files are remembered.
        if time.time() - path.stat().st_mtime > _SETTLED_SECONDS:
            self._known[str(path.resolve())] = _stamp(path, record)
            self._changed = True

    def save(self) -> None:
        if not self._changed:
            return
        kept = dict(list(self._known.items())[-self._LIMIT :])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(kept))
            partial.replace(self._file)
        except OSError as e:
            logger.debug("cannot remember verified files in %s: %s", self._file, e)


def _stamp(path: Path, record: FileRecord) -> list[object]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.sha256]
