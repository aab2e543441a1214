"""What the code may weigh: nodes of its syntax tree, not lines, so that packing gains nothing.

The ratios are those of `make house-numbers`, measured here on the working tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.source import ROOT, package_files, tree
from tools.house_numbers import is_node, ratios, read_package

COMFORTABLE_FILE, LARGEST_FILE = 1200, 2000
COMFORTABLE_FUNCTION, LARGEST_FUNCTION = 150, 390
MOST_ARGUMENTS = 5

BUDGET = {
    "AST nodes a code line": 5,
    "arguments of a function, 90th percentile": 3,
    "functions over 50 lines, %": 1.5,
    "functions over 100 lines": 0,
    "private helpers that are used once, %": 55,
    "modules with exactly one importer": 45,
    "basenames that occur twice or more": 7,
    "cycles between modules": 0,
}


def sizes() -> Iterator[tuple[str, int, int, int]]:
    """(name, nodes, comfortable, largest) of every file and every function."""
    for file in package_files().values():
        name = file.relative_to(ROOT).as_posix()
        yield name, nodes(tree(file)), COMFORTABLE_FILE, LARGEST_FILE
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{name}:{node.name}", nodes(node), COMFORTABLE_FUNCTION, LARGEST_FUNCTION


def nodes(root: ast.AST) -> int:
    return sum(is_node(node) for node in ast.walk(root))


def test_nothing_is_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    outliers = [
        (name, count, largest)
        for name, count, comfortable, largest in sizes()
        if count > comfortable
    ]
    with capsys.disabled():
        print("\nlarger than is comfortable, in AST nodes:")
        for name, count, _ in sorted(outliers):
            print(f"  {count:5d}  {name}")
    wrong = [
        f"{name}: {count} AST nodes, at most {most}"
        for name, count, most in outliers
        if count > most
    ]
    assert wrong == []


def test_no_function_takes_a_long_row_of_arguments() -> None:
    """Three positional ones are comfortable; the rest is keyword-only or in an options object."""
    wrong = []
    for file in package_files().values():
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = (*node.args.posonlyargs, *node.args.args)
                count = len([a for a in arguments if a.arg not in ("self", "cls")])
                # a kernel's arguments are what a launch passes: it has no objects
                kernel = any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
                if count > MOST_ARGUMENTS and not kernel:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.name}: {count}")
    assert not wrong


def test_the_ratios_are_kept() -> None:
    """What each figure is, `tools/house_numbers.py` says."""
    measured = ratios(read_package(ROOT))
    assert measured.keys() == BUDGET.keys()
    over = {name: value for name, value in measured.items() if value > BUDGET[name]}
    assert not over
