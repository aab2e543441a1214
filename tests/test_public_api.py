"""What is public is said to be, package by package, and importing the shop window costs nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

import twotower
from tests.helpers.processes import run_python
from tests.helpers.source import imported, package_files, tree

MODULES = {name: file for name, file in package_files().items() if not name.endswith("__main__")}
HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "transformers",
    "safetensors",
    "tokenizers",
)


def declared(body: ast.Module) -> list[str] | None:
    """The module's `__all__`, if it has one."""
    for node in body.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            assert isinstance(node, (ast.Assign, ast.AnnAssign))
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return None


def bound(body: ast.Module) -> Iterator[str]:
    """Every name a module binds at its top level, conditional imports included."""
    for node in ast.walk(body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    for node in body.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def wrong_names(body: ast.Module) -> set[str]:
    """Names of `__all__` that are doubled or not there, and what a package defines beside it."""
    public = {
        n.name
        for n in body.body
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
    }
    names = declared(body) or []
    return (
        (public - set(names))
        | (set(names) - set(bound(body)))
        | {n for n in names if names.count(n) > 1}
    )


def test_packages_say_what_is_public() -> None:
    """In `__all__`; of a module it is what has no underscore, and the type checker lets no other
    module take what one only imports."""
    packages = {name: file for name, file in MODULES.items() if file.name == "__init__.py"}
    assert {
        name: wrong for name, file in packages.items() if (wrong := wrong_names(tree(file)))
    } == {}


def test_a_name_that_is_missing_doubled_or_not_there_is_found() -> None:
    body = ast.parse(
        "__all__ = ['a', 'b', 'b', 'gone']\ndef a(): ...\ndef b(): ...\ndef c(): ...\ndef _d(): ..."
    )
    assert wrong_names(body) == {"b", "c", "gone"}


def test_a_package_is_a_shop_window() -> None:
    """It re-exports and registers; it neither probes the machine nor reads the environment."""
    probes = {"os", "sys", "ctypes", "platform", "subprocess", "shutil", "logging"}
    packages = {name: file for name, file in MODULES.items() if file.name == "__init__.py"}
    assert {"twotower", "twotower.runtime"} <= set(packages)
    assert {
        name: found
        for name, file in packages.items()
        if (found := probes & set(imported(tree(file))))
    } == {}


def test_a_module_opens_with_a_sentence() -> None:
    first = {
        name: (ast.get_docstring(tree(file)) or "").split("\n\n")[0].strip()
        for name, file in MODULES.items()
    }
    assert {name: text for name, text in first.items() if not text.endswith((".", ":"))} == {}


def test_lazy_names_resolve() -> None:
    for name in twotower.__all__:
        assert getattr(twotower, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = twotower.Nothing


@pytest.mark.parametrize(
    "statement",
    (
        "import twotower",
        "from twotower import GenerationConfig, TwoTower",
        "import twotower.bundle",
    ),
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run_python("-c", code, check=True).stdout.split() == []
