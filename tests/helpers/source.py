"""The project's own source files and what they import, read and not run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKPOINTS = {
    "a": ROOT / "tests" / "fixtures" / "hybrid-a",
    "b": ROOT / "tests" / "fixtures" / "hybrid-b",
    "tiny": ROOT / "assets" / "twotower-tiny",
}
LINKED = ("export", "builders", "runtime", "calibration", "kernels")
"""The five top-level folders that are subpackages of `twotower` by a relative link."""


def package_files() -> dict[str, Path]:
    """Module name -> file, of every module of `twotower`; each file once, by its real path."""
    out: dict[str, Path] = {}
    for folder, name in (
        (ROOT / "src" / "twotower", "twotower"),
        *((ROOT / link, f"twotower.{link}") for link in LINKED),
    ):
        for file in sorted(folder.rglob("*.py")):
            if file.resolve() == file:
                out[_module(name, file.relative_to(folder))] = file
    return out


def _module(root: str, relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join((root, *(parts[:-1] if parts[-1] == "__init__" else parts)))


@cache
def tree(file: Path) -> ast.Module:
    """The file parsed."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(node: ast.AST) -> Iterator[str]:
    """Modules imported anywhere below a node: `a.b` of `import a.b` and `from a.b import c`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield child.module


@cache
def imports(file: Path) -> frozenset[str]:
    """Modules imported anywhere in a file."""
    return frozenset(imported(tree(file)))


def imported_at_import(file: Path) -> set[str]:
    """Modules that importing the file imports: not those in functions or for type checkers."""
    names: set[str] = set()
    pending: list[ast.AST] = list(tree(file).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(imported(node))
        pending.extend(ast.iter_child_nodes(node))
    return names
