"""Import rules that import-linter cannot say: one adapter a vendor, one name a module.

The contracts between layers are in pyproject.toml and are checked by `make lint`.
"""

from __future__ import annotations

import ast
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.helpers.source import LINKED, ROOT, imports, package_files, tree

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
        *(f"kernels/device/{name}.py" for name in ("formats", "pairs", "product")),
    ),
    "twotower.kernels.device": ("kernels/compile.py", "kernels/device/product.py"),
    # A peer to measure, and an oracle of tests.
    "transformers": ("src/twotower/bench/peers/hugging_face.py",),
}


def real_path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def importing(*modules: str) -> set[str]:
    """Files that import one of these, or what is below them."""
    starts = tuple(f"{module}." for module in modules)
    return {
        real_path(f)
        for f in package_files().values()
        if any(f"{name}.".startswith(starts) for name in imports(f))
    }


@pytest.mark.parametrize("vendor", ADAPTERS)
def test_a_vendor_is_imported_behind_its_adapters_only(vendor: str) -> None:
    assert importing(vendor) <= set(ADAPTERS[vendor])


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
    others = [f for folder in ("tests", "tools") for f in (ROOT / folder).rglob("*.py")]
    for file in (*package_files().values(), *others):
        names = {name.split(".")[0] for name in imports(file)}
        assert not names & set(LINKED), f"{file}: write twotower.<folder>"


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
    every = {adapter for some in ADAPTERS.values() for adapter in some}
    engines = [a for a in every if a.startswith(("builders/", "runtime/")) and "__init__" not in a]
    adapters = [f"twotower.{a.removesuffix('.py').replace('/', '.')}" for a in engines]
    registries = {"builders/__init__.py", "runtime/engines/__init__.py"}
    assert importing(*adapters) <= registries | {"calibration/watched_engine.py"}
