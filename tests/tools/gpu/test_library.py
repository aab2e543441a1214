"""A library in parts is the same library again, or an error names the part that is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.errors import check_error
from tools.gpu.library import join_file, split_file
from twotower.errors import ConfigError


@pytest.fixture
def split(tmp_path: Path) -> tuple[bytes, list[Path]]:
    """The bytes of a library of odd size, and the folders its three parts are in."""
    data = np.random.default_rng(0).integers(0, 9, 100_001, np.uint8).tobytes()
    (tmp_path / "lib.so.1").write_bytes(data)
    folders = [tmp_path / f"call{i}" for i in range(3)]
    parts = split_file(tmp_path / "lib.so.1", folders, shares=(5, 2, 3), preset=1)
    assert [part.name for part in parts] == ["lib.so.1.0.xz", "lib.so.1.1.xz", "lib.so.1.2.xz"]
    return data, folders


def test_parts_are_joined_whatever_the_order_of_their_folders(
    split: tuple[bytes, list[Path]], tmp_path: Path
) -> None:
    data, folders = split
    out = join_file("lib.so.1", folders[::-1], tmp_path / "site" / "lib.so.1")
    assert out.read_bytes() == data
    assert [f.name for f in out.parent.iterdir()] == ["lib.so.1"]


def refused(split: tuple[bytes, list[Path]], what: str, name: str = "lib.so.1") -> None:
    out = split[1][0] / "out"
    with pytest.raises(ConfigError) as caught:
        join_file(name, split[1], out)
    check_error(str(caught.value), what)
    assert not out.exists()


def test_a_missing_or_damaged_part_is_named(split: tuple[bytes, list[Path]]) -> None:
    refused(split, "no part of other.so", "other.so")
    refused((split[0], split[1][:2]), "lib.so.1.2.xz")
    part = split[1][1] / "lib.so.1.1.xz"
    part.write_bytes(part.read_bytes()[:-20])
    refused(split, "lib.so.1.1.xz is damaged")


def test_parts_of_another_library_are_refused(
    split: tuple[bytes, list[Path]], tmp_path: Path
) -> None:
    (tmp_path / "lib.so.1").write_bytes(bytes(100_001))
    split_file(tmp_path / "lib.so.1", [tmp_path / "x", split[1][1], tmp_path / "y"], preset=1)
    (split[1][1] / "lib.so.1.json").unlink()
    refused(split, "do not belong together")


def test_a_joined_library_is_not_joined_again(tmp_path: Path) -> None:
    (tmp_path / "lib").write_bytes(b"there")
    assert join_file("lib", [], tmp_path / "lib").read_bytes() == b"there"
