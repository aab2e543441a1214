"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.errors import check_error
from twotower.errors import ConfigError
from twotower.files import replacing, require_place, write_atomically, write_output


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, memoryview(b"\x00\x01"))
    assert path.read_bytes() == b"\x00\x01"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    with pytest.raises(ValueError, match="stop"), replacing(path) as partial:
        partial.write_text("new")
        raise ValueError("stop")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_written_to_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "a.json", b"")


def test_what_a_killed_process_left_is_removed_and_not_what_a_living_one_writes(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive, others = f".a.json.{os.getppid()}", [".a.json.mine", f".b.json.{dead.pid}"]
    for name in (f".a.json.{dead.pid}", alive, *others):
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "a.json", b"whole")
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", alive, *others}


def test_a_file_a_user_named_is_refused_in_three_parts(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for check in (require_place, lambda path, error: write_output(path, b"", error=error)):
        for path in (tmp_path, tmp_path / "file" / "a.json"):
            with pytest.raises(ConfigError) as caught:
                check(path, error=ConfigError)
            check_error(str(caught.value), "cannot write")
