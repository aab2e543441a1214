"""The cache of built engines, by key, and a digest of the code that made them.

The cache is a folder of files that appear whole, are checked when used, and take no space of their
own while they are in use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from twotower.builders.base import BuildConfig, Report
from twotower.bundle import Bundle, FileRecord, hash_file, write_json
from twotower.errors import BuildError
from twotower.files import byte_counter, locked

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".cache"
"""In a bundle's `engines`: an engine and its entry are one file with two names."""

_ABANDONED_SECONDS = 24 * 3600.0  # a half-written entry that old has no writer any more


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine in the cache: its size and SHA-256, and what its build observed."""

    record: FileRecord
    facts: dict[str, Any]


_PACKAGE = Path(__file__).parents[1]


def kernel_source() -> str:
    """SHA-256 of what kernels are made from: another version of twotower may have others."""
    return _digest_of("kernels")


def planning_source() -> str:
    """SHA-256 of what decides into which engines a bundle is built, and how."""
    return _digest_of("builders", "config", "graph_lint", "weights", "spec.py")


@cache
def _digest_of(*names: str) -> str:
    """SHA-256 of source files of this package, and of all in its folders of these names."""
    # Read and not imported: engines that are kept need none of it.
    digest = hashlib.sha256()
    for name in names:
        path = _PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


class EngineCache:
    """A folder of engines by key, for several processes at once.

    `trim` keeps engines that no bundle uses to `most` bytes, dropping the least recently used.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder = folder
        self._most = most

    def prepare(self) -> None:
        """Makes the folder; BuildError if it cannot be written."""
        probe = self.folder / f".probe.{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise BuildError(
                f"the engine cache '{self.folder}' cannot be written",
                found=str(e),
                do="check permissions and disk space, name another folder with --cache, "
                "or go without with --no-cache",
            ) from e

    def find(self, key: str) -> Entry | None:
        """The entry of a key if both its files are there; its content is not looked at."""
        note, engine = self._note(key), self._engine(key)
        try:
            data = json.loads(note.read_text(encoding="utf-8"))
            entry = Entry(FileRecord(int(data["size"]), str(data["sha256"])), dict(data["facts"]))
            size = engine.stat().st_size
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            what = f"{type(e).__name__}: {e}"
            logger.warning("the cache entry %s is not readable (%s); built again", note, what)
            return None
        if size != entry.record.size:
            what = f"{size} bytes instead of {entry.record.size}"
            logger.warning("the cached engine %s is damaged (%s); built again", engine, what)
            return None
        return entry

    def take(self, key: str, target: Path, *, report: Report) -> Entry | None:
        """Puts a cached engine at `target`, as a link where that is possible, and checks it.

        A damaged entry is dropped with a warning. None if there is none or it was damaged.

        Raises:
            OSError: `target` cannot be written.
        """
        with self._locked():
            entry = self.find(key)
            if entry is None:
                return None
            source = self._engine(key).open("rb")  # an open file outlives its entry
            linked = _linked(self._engine(key), target)
        with source:
            if not linked:
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file, 8 << 20)
        tick = byte_counter(
            report,
            f"{target.name}: from the cache",
            entry.record.size,
        )
        if hash_file(target, tick) != entry.record.sha256:
            target.unlink()
            what = f"{self._engine(key)} is damaged (its SHA-256 differs)"
            logger.warning("the cached engine %s; it is dropped and built again", what)
            self.drop(key)
            return None
        try:
            os.utime(self._note(key))  # what was used last is dropped last
        except OSError as e:
            logger.debug("cannot mark %s as used: %s", key, e)
        return entry

    def put(
        self,
        key: str,
        engine: Path,
        facts: dict[str, Any],
        *,
        report: Report,
    ) -> FileRecord:
        """Keeps a built engine, or warns if space is lacking; its size and SHA-256."""
        size = engine.stat().st_size
        record = FileRecord.of(engine, byte_counter(report, f"{engine.name}: checksum", size))
        partial = self.folder / f".{key}.{secrets.token_hex(8)}"
        try:
            if not _linked(engine, partial):
                shutil.copyfile(engine, partial)
            with self._locked():
                # At no moment does a note speak of another's engine.
                self._note(key).unlink(missing_ok=True)
                partial.replace(self._engine(key))
                note = {"size": record.size, "sha256": record.sha256, "facts": facts}
                write_json(self._note(key), note)
        except OSError as e:
            what = f"{engine.name} is not kept in the engine cache '{self.folder}'"
            logger.warning("%s: %s", what, e)
        finally:
            partial.unlink(missing_ok=True)
        return record

    def drop(self, key: str) -> None:
        """Removes an entry; engines in use stay where they are used."""
        with self._locked():
            self._remove(key)

    def trim(self) -> list[str]:
        """Drops what is too much, and what killed processes left; returns the dropped keys."""
        if not self.folder.is_dir():
            return []
        dropped: list[str] = []
        with self._locked():
            self._sweep()
            unused: list[tuple[float, str, int]] = []  # time of last use, key, bytes
            for note in self.folder.glob("*.json"):
                engine = self._engine(note.stem).stat()
                if engine.st_nlink == 1:
                    unused.append((note.stat().st_mtime, note.stem, engine.st_size))
            total = sum(size for _, _, size in unused)
            for _, key, size in sorted(unused):
                if total <= self._most:
                    break
                self._remove(key)
                dropped.append(key)
                total -= size
        if dropped:
            logger.info("dropped %d unused engines from '%s'", len(dropped), self.folder)
        return dropped

    def _sweep(self) -> None:
        """Removes halves of entries, and files whose writer was killed."""
        now = time.time()
        for file in self.folder.iterdir():
            if file.suffix in (".engine", ".json") and not file.name.startswith("."):
                other = file.with_suffix(".json" if file.suffix == ".engine" else ".engine")
                if not other.exists():
                    file.unlink()
            elif file.name != ".lock" and now - file.stat().st_ctime > _ABANDONED_SECONDS:
                file.unlink()

    def _remove(self, key: str) -> None:
        self._note(key).unlink(missing_ok=True)
        self._engine(key).unlink(missing_ok=True)

    def _locked(self) -> Any:
        """Held for renames and links only, never while bytes are copied or hashed."""
        return locked(self.folder / ".lock", waiting=lambda: None)

    def _engine(self, key: str) -> Path:
        return self.folder / f"{key}.engine"

    def _note(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def open_cache(bundle: Bundle, config: BuildConfig) -> EngineCache | None:
    """The cache a build uses, not yet made; None for none."""
    if not config.use_cache:
        return None
    folder = config.cache or bundle.path / "engines" / CACHE_FOLDER
    return EngineCache(folder, config.cache_bytes)


def _linked(source: Path, target: Path) -> bool:
    """Whether `target` could be made a second name of `source`, which not every file system has."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
