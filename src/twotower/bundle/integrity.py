"""Whether a folder's files are those it lists; each is read once, then trusted until it changes."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

from twotower.files import FileRecord, Progress, hash_files, inside, write_atomically

logger = logging.getLogger(__name__)
_SETTLED_SECONDS = 2.0


def check_files(
    root: Path, records: Mapping[str, FileRecord], progress: Progress | None = None
) -> list[str]:
    """Files under `root` that are missing, lead out of it, or have another size or content.

    Contents are hashed, four files at a time, the first time; the result is remembered for the user
    with size, times and inode, so that opening an unchanged bundle only looks at the directory.
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
    """Those of the files that this user has not hashed since they last changed."""
    remembered = _Remembered()
    return {n: record for n, record in records.items() if not remembered.knows(root / n, record)}


def remember_files(root: Path, records: Mapping[str, FileRecord]) -> None:
    """Notes that these files have the SHA-256 listed: of who read them otherwise."""
    remembered = _Remembered()
    for name, record in records.items():
        remembered.add(root / name, record)
    remembered.save()


class _Remembered:
    """Files this user has hashed, by absolute path. Losing it costs time, never correctness."""

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
        # A file changed within the clock's tick of its stamp would keep the stamp: only settled
        # files are remembered.
        if time.time() - path.stat().st_mtime > _SETTLED_SECONDS:
            self._known[str(path.resolve())] = _stamp(path, record)
            self._changed = True

    def save(self) -> None:
        if not self._changed:
            return
        kept = dict(list(self._known.items())[-self._LIMIT :])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(kept))
        except OSError as e:
            logger.debug("cannot remember verified files in %s: %s", self._file, e)


def _stamp(path: Path, record: FileRecord) -> list[object]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, record.sha256]
