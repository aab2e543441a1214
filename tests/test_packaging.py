"""What the wheel holds: one top-level name, and all linked folders as real files."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.helpers.source import LINKED, ROOT, package_files
from twotower import __version__

pytestmark = [pytest.mark.wheel, pytest.mark.slow]


INFO = f"twotower-{__version__}.dist-info"


@pytest.fixture(scope="module")
def held(wheel: Path) -> dict[str, bytes]:
    """Its files by name."""
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}


def test_one_top_level_name(held: dict[str, bytes]) -> None:
    assert {n.split("/")[0] for n in held} == {"twotower", INFO}


def test_it_holds_exactly_the_files_of_the_tree(held: dict[str, bytes]) -> None:
    """Those of the linked folders are whole."""
    source = ROOT / "src"
    walked = (
        Path(folder) / file
        for folder, _, files in os.walk(source / "twotower", followlinks=True)
        for file in files
    )
    tools = {"ruff.toml", ".ruff_cache", "__pycache__"}  # of those who work on it
    tree = {f.relative_to(source).as_posix(): f for f in walked if not tools & set(f.parts)}
    assert {n for n in held if n.startswith("twotower/")} == set(tree) >= {"twotower/py.typed"}
    assert len([n for n in tree if n.endswith(".py")]) == len(package_files())
    for folder in LINKED:
        name = f"twotower/{folder}/__init__.py"
        assert held[name] == tree[name].read_bytes()


def test_it_installs_the_command_and_the_license(held: dict[str, bytes]) -> None:
    assert "twotower = twotower.cli.main:main" in held[f"{INFO}/entry_points.txt"].decode()
    assert f"{INFO}/licenses/LICENSE" in held
    assert "License-Expression: Apache-2.0" in held[f"{INFO}/METADATA"].decode()


def test_no_inference_library_is_a_hard_dependency(held: dict[str, bytes]) -> None:
    lines = held[f"{INFO}/METADATA"].decode().splitlines()
    required = [line.split(":", 1)[1] for line in lines if line.startswith("Requires-Dist:")]
    hard = {Requirement(r).name for r in required if "extra ==" not in r}
    assert hard == {"ml-dtypes", "numpy", "tokenizers"}
