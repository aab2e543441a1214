"""Which of two distributions of one module counts, in folders of packages made for the purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from twotower.extras import installed_libraries
from twotower.hardware import probe_machine, select_target

NAMES = ("tensorrt", "onnxruntime", "onnxruntime-gpu")


def install(folder: Path, distribution: str, version: str, *, listed: bool = True) -> Path:
    """A distribution with a module onnxruntime that raises when it is imported."""
    module = folder / "onnxruntime" / "__init__.py"
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text("raise AssertionError('nothing here is to be imported')\n", encoding="utf-8")
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
    )
    if listed:
        (info / "RECORD").write_text(
            "onnxruntime/__init__.py,,\nonnxruntime/capi/__init__.py,,\n", encoding="utf-8"
        )
    return folder


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The module search path, empty; what is loaded already would be found before any of it."""
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    empty: list[str] = []
    monkeypatch.setattr(sys, "path", empty)
    return empty


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("first", ["onnxruntime", "onnxruntime-gpu"])
def test_the_one_in_front_is_the_library(
    tmp_path: Path, path: list[str], first: str, listed: bool
) -> None:
    versions = {"onnxruntime": "1.30", "onnxruntime-gpu": "1.31"}
    for name in sorted(versions, key=lambda name: name != first):
        path += [str(install(tmp_path / name, name, versions[name], listed=listed))]
    assert installed_libraries(NAMES) == {first: versions[first]}
    here = probe_machine()
    assert here.conflict is None
    assert select_target(here, ("ort-cpu",)) == "ort-cpu"


@pytest.mark.parametrize("listed", [True, False])
def test_two_in_one_folder_have_overwritten_one_another(
    tmp_path: Path, path: list[str], listed: bool
) -> None:
    for name in NAMES[1:]:
        path[:] = [str(install(tmp_path, name, "1.32", listed=listed))]
    assert installed_libraries(NAMES) == {"onnxruntime": "1.32", "onnxruntime-gpu": "1.32"}
    assert probe_machine().conflict


def test_a_second_copy_further_back_does_not_count(tmp_path: Path, path: list[str]) -> None:
    """A virtual environment with onnxruntime-gpu over a system with both of them."""
    install(tmp_path / "system", "onnxruntime", "1.29")
    install(tmp_path / "system", "onnxruntime-gpu", "1.29")
    path += [str(install(tmp_path / "own", "onnxruntime-gpu", "1.32")), str(tmp_path / "system")]
    assert installed_libraries(NAMES) == {"onnxruntime-gpu": "1.32"}


def test_one_of_them_alone_needs_no_decision(tmp_path: Path, path: list[str]) -> None:
    path += [str(install(tmp_path, "onnxruntime", "1.32"))]
    assert installed_libraries(NAMES) == {"onnxruntime": "1.32"}
    path.clear()
    assert installed_libraries(NAMES) == {}
