"""The cache of engines: whole or not there, checked when used, bounded, shared between processes and file systems."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import flip_byte
from tests.helpers.errors import fails
from tests.helpers.processes import environment
from twotower.builders import cache as cache_module
from twotower.builders.base import silent
from twotower.builders.cache import EngineCache
from twotower.errors import BuildError

KEY = "a" * 32


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    made = EngineCache(tmp_path / "cache", most=1000)
    made.prepare()
    return made


def engine(folder: Path, name: str = "x.engine", content: bytes = b"engine" * 50) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_bytes(content)
    return file


def names(cache: EngineCache) -> set[str]:
    return {p.name for p in cache.folder.iterdir()} - {".lock"}


def test_what_was_put_is_taken_as_the_same_file(cache: EngineCache, tmp_path: Path) -> None:
    made = engine(tmp_path / "new")
    record = cache.put(KEY, made, {"layers": 3}, report=silent)
    assert record.size == 300
    assert cache.take("b" * 32, tmp_path / "other", report=silent) is None
    seen: list[tuple[object, ...]] = []
    entry = cache.take(KEY, tmp_path / "taken", report=lambda *told: seen.append(told))
    assert entry is not None
    assert (entry.record, entry.facts) == (record, {"layers": 3})
    assert seen[-1] == ("taken: from the cache", 300, 300)
    files = (made, tmp_path / "taken", cache.folder / f"{KEY}.engine")
    assert len({file.stat().st_ino for file in files}) == 1, "no byte is copied"


def test_another_file_system_gets_a_copy(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(cache_module.os, "link", refuse)
    made = engine(tmp_path / "new")
    record = cache.put(KEY, made, {}, report=silent)
    entry = cache.take(KEY, tmp_path / "taken", report=silent)
    assert entry is not None
    assert entry.record == record
    assert (tmp_path / "taken").read_bytes() == made.read_bytes()
    assert (tmp_path / "taken").stat().st_nlink == 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "no engine", "no note", "garbage"])
def test_a_damaged_entry_is_no_entry(
    cache: EngineCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache.put(KEY, engine(tmp_path / "new"), {}, report=silent)
    file, note = cache.folder / f"{KEY}.engine", cache.folder / f"{KEY}.json"
    if damage == "flipped":
        flip_byte(file, 100)
    elif damage == "truncated":
        os.truncate(file, 299)
    elif damage == "garbage":
        note.write_text("[")
    else:
        (file if damage == "no engine" else note).unlink()
    with caplog.at_level(logging.WARNING):
        assert cache.take(KEY, tmp_path / "taken", report=silent) is None
    assert not (tmp_path / "taken").exists()
    assert bool(caplog.records) == (damage in ("flipped", "truncated", "garbage")), (
        "damage is told; an entry that is not there is not"
    )
    new = engine(tmp_path / "new", "again.engine")
    cache.put(KEY, new, {}, report=silent)
    assert cache.take(KEY, tmp_path / "taken", report=silent) is not None


def test_putting_never_writes_through_a_link_in_use(cache: EngineCache, tmp_path: Path) -> None:
    used = engine(tmp_path / "new", "used.engine", b"old" * 100)
    cache.put(KEY, used, {}, report=silent)
    cache.put(KEY, engine(tmp_path / "new", "newer.engine", b"new" * 100), {}, report=silent)
    assert used.read_bytes() == b"old" * 100


def test_the_least_recently_used_go_first_and_what_is_in_use_is_free(
    cache: EngineCache, tmp_path: Path
) -> None:
    used = engine(tmp_path / "new", "used.engine", b"u" * 5000)
    cache.put("used", used, {}, report=silent)
    for i, key in enumerate(("one", "two", "three", "four")):
        made = engine(tmp_path / "new", f"{key}.engine", key.encode() * 80)
        cache.put(key, made, {}, report=silent)
        made.unlink()
        os.utime(cache.folder / f"{key}.json", (1000 + i, 1000 + i))
    cache.take("one", tmp_path / "taken", report=silent)
    (tmp_path / "taken").unlink()
    assert cache.trim() == ["two"], "240 + 400 + 320 bytes are within 1000; the first was used last"
    assert cache.find("used") is not None
    used.unlink()
    os.utime(cache.folder / "used.json", (1, 1))
    assert cache.trim() == ["used"], "nothing uses it any more, it is the oldest, and the rest fits"


def test_what_killed_processes_left_is_swept(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEY, engine(tmp_path / "new"), {}, report=silent)
    for name in (".half.1234", "lonely.engine", "lonelier.json"):
        (cache.folder / name).write_text("{}")
    cache.trim()
    assert names(cache) == {f"{KEY}.engine", f"{KEY}.json", ".half.1234"}, (
        "somebody may still be writing it"
    )
    later = time.time() + 2 * 24 * 3600
    monkeypatch.setattr(cache_module.time, "time", lambda: later)
    cache.trim()
    assert names(cache) == {f"{KEY}.engine", f"{KEY}.json"}


def test_an_unwritable_cache_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with fails(BuildError, "cannot be written", do="--no-cache"):
        EngineCache(tmp_path / "file" / "cache", most=1).prepare()


def test_a_full_cache_loses_the_entry_and_not_the_engine(
    cache: EngineCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "link", full)
    monkeypatch.setattr(cache_module.shutil, "copyfile", full)
    made = engine(tmp_path / "new")
    assert cache.put(KEY, made, {}, report=silent).size == 300
    assert "No space left" in caplog.text
    assert not names(cache)


def test_writers_at_once_leave_one_sound_entry(cache: EngineCache, tmp_path: Path) -> None:
    """Four processes put different content under one key, over and over, while this one takes it."""
    script = (
        "import sys; from pathlib import Path; from twotower.builders.cache import EngineCache\n"
        "folder, who = Path(sys.argv[1]), sys.argv[2]\n"
        "cache = EngineCache(folder / 'cache', 1000)\n"
        "for i in range(30):\n"
        "    file = folder / f'{who}.{i}'; file.write_bytes((who * 1000).encode())\n"
        f"    cache.put('{KEY}', file, {{'who': who}}, report=lambda *told: None)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), who], env=environment())
        for who in "abcd"
    ]
    taken = 0
    while any(w.poll() is None for w in writers) or not taken:
        target = tmp_path / "taken"
        target.unlink(missing_ok=True)
        entry = cache.take(KEY, target, report=silent)
        if entry is not None:
            taken += 1
            assert target.read_bytes() == entry.facts["who"].encode() * 1000
    assert [w.wait() for w in writers] == [0, 0, 0, 0]
    assert names(cache) == {f"{KEY}.engine", f"{KEY}.json"}
