"""Import rules that import-linter cannot say: one adapter a vendor, one name a module.

The contracts between layers are in pyproject.toml and are checked by `make lint`.
"""

from __future__ import annotations

import ast
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.helpers.source import LINKED, ROOT, imported, package_files, tree

ADAPTERS = {
    "tensorrt": ("src/twotower/tensorrt_library.py",),
    "tensorrt_rtx": ("src/twotower/tensorrt_library.py",),
    "onnxruntime": ("src/twotower/onnx_runtime.py",),
    "twotower.onnx_runtime": (
        "builders/ort/cpu.py",
        "runtime/engines/ort.py",
        "calibration/watched_engine.py",
        "export/verify.py",
        "src/twotower/product_probe.py",
    ),
    "cuda": ("runtime/engines/__init__.py",),
    "modelopt": (),  # an oracle of tests too
    "lm_eval": ("src/twotower/evaluate/lm_eval_model.py",),
    "matplotlib": ("src/twotower/evaluate/figures.py",),
    "triton": (
        "kernels/compile.py",
        "kernels/device/formats.py",
        "kernels/device/pairs.py",
        "kernels/device/product.py",
    ),
    "twotower.kernels.device": (
        "kernels/compile.py",
        "kernels/device/product.py",
    ),
    "transformers": (
        "src/twotower/bench/peers/hugging_face.py",
    ),  # a peer to measure, and an oracle of tests
}


def real_path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("vendor", ADAPTERS)
def test_a_vendor_is_imported_behind_its_adapters_only(vendor: str) -> None:
    users = {
        real_path(f)
        for f in package_files().values()
        if any(f"{name}.".startswith(f"{vendor}.") for name in imported(tree(f)))
    }
    assert users <= set(ADAPTERS[vendor]), (
        f"{vendor} is imported outside its adapters {ADAPTERS[vendor]}"
    )


def test_the_walk_sees_all_folders() -> None:
    """Or the rules above would hold for want of files."""
    files = [real_path(f) for f in package_files().values()]
    for pattern in ("src/twotower/*.py", *(f"{folder}/*.py" for folder in LINKED)):
        assert any(fnmatch(f, pattern) for f in files), pattern
    assert "runtime/engines/ort.py" in files
    assert len(files) == len(set(files))


@pytest.mark.parametrize("folder", LINKED)
def test_the_folders_are_relative_links(folder: str) -> None:
    assert os.readlink(ROOT / "src" / "twotower" / folder) == f"../../{folder}"


def test_modules_go_by_one_name() -> None:
    """`import runtime` would work from the repository root, and load each module twice."""
    files = [
        *package_files().values(),
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
    ]
    wrong = [
        f"{real_path(f)}: {name}"
        for f in files
        for name in imported(tree(f))
        if name.split(".")[0] in LINKED
    ]
    assert not wrong, "write twotower.<folder>"


def test_imports_are_absolute() -> None:
    wrong = [
        real_path(f)
        for f in package_files().values()
        for n in ast.walk(tree(f))
        if isinstance(n, ast.ImportFrom) and n.level
    ]
    assert not wrong


def test_only_the_registries_and_the_command_line_name_vendor_files() -> None:
    """An engine's file is imported when it is chosen; a second importer would need its library."""
    engines = {
        adapter
        for some in ADAPTERS.values()
        for adapter in some
        if adapter.startswith(("builders/", "runtime/"))
    }
    adapters = {f"twotower.{adapter.removesuffix('.py').replace('/', '.')}" for adapter in engines}
    allowed = {
        "builders/__init__.py",
        "runtime/engines/__init__.py",
        "calibration/watched_engine.py",
    }
    users = {real_path(f) for f in package_files().values() if adapters & set(imported(tree(f)))}
    assert users <= allowed
