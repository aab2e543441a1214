"""What the wheel holds: one top-level name, and all linked folders as real files."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from tests.helpers.source import ROOT, package_files
from twotower import __version__

pytestmark = [pytest.mark.wheel, pytest.mark.slow]


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {n for n in archive.namelist() if not n.endswith("/")}


def test_one_top_level_name(names: set[str]) -> None:
    assert {n.split("/")[0] for n in names} == {"twotower", f"twotower-{__version__}.dist-info"}


def test_it_holds_exactly_the_modules_of_the_tree(names: set[str]) -> None:
    expected = {
        f"{module.replace('.', '/')}{'/__init__' if file.name == '__init__.py' else ''}.py"
        for module, file in package_files().items()
    }
    assert {n for n in names if n.endswith(".py")} == expected
    source = ROOT / "src"
    walked = (
        Path(folder) / file
        for folder, _, files in os.walk(source / "twotower", followlinks=True)
        for file in files
    )
    tools = ("ruff.toml", ".ruff_cache")  # of those who work on it
    data = {
        f.relative_to(source).as_posix()
        for f in walked
        if f.suffix not in (".py", ".pyc") and not set(tools) & set(f.parts)
    }
    assert (
        {n for n in names if n.startswith("twotower/") and not n.endswith(".py")}
        == data
        >= {"twotower/py.typed"}
    )


def test_modules_of_the_linked_folders_are_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for module in (
            "twotower.export.exporter",
            "twotower.builders.build",
            "twotower.runtime.engines.ort",
        ):
            assert (
                archive.read(f"{module.replace('.', '/')}.py")
                == package_files()[module].read_bytes()
            )


def test_it_installs_the_command_and_the_license(wheel: Path, names: set[str]) -> None:
    info = f"twotower-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert (
            "twotower = twotower.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
        )
        metadata = archive.read(f"{info}/METADATA").decode()
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata


def test_no_inference_library_is_a_hard_dependency(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"twotower-{__version__}.dist-info/METADATA").decode()
    required = [
        line.split(":", 1)[1].strip()
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:")
    ]
    hard = {r.split(">")[0].split("=")[0].strip() for r in required if "extra ==" not in r}
    assert hard == {"ml-dtypes", "numpy", "tokenizers"}
