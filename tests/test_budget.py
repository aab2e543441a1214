"""Long files and functions, listed; only the very long ones fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.source import ROOT, package_files, tree

COMFORTABLE_FILE, LONGEST_FILE = 250, 500
COMFORTABLE_FUNCTION, LONGEST_FUNCTION = 50, 100
MOST_ARGUMENTS = 5


def sizes() -> Iterator[tuple[str, int, int, int]]:
    """(name, lines, comfortable, longest) of every file and every function."""
    for file in package_files().values():
        name = file.relative_to(ROOT).as_posix()
        yield name, len(file.read_text(encoding="utf-8").splitlines()), COMFORTABLE_FILE, LONGEST_FILE
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{name}:{node.name}", node.end_lineno - node.lineno + 1, COMFORTABLE_FUNCTION, LONGEST_FUNCTION


def test_nothing_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    outliers = [(name, lines, most) for name, lines, comfortable, most in sizes() if lines > comfortable]
    lines_of_report = [f"  {lines:4d} lines  {name}" for name, lines, _ in sorted(outliers)]
    with capsys.disabled():
        print("", "longer than is comfortable:", *lines_of_report, sep="\n")
    assert [f"{name}: {lines} lines, {most} are the point to split" for name, lines, most in outliers if lines > most] == []


def test_no_function_takes_a_long_row_of_arguments() -> None:
    """Three positional ones are comfortable; the rest of what it needs is keyword-only or in an options object."""
    wrong = []
    for file in package_files().values():
        for node in ast.walk(tree(file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = len([a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")])
                kernel = any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
                if count > MOST_ARGUMENTS and not kernel:  # a kernel's arguments are what a launch passes: it has no objects
                    wrong.append(f"{file.relative_to(ROOT)}:{node.name}: {count}")
    assert not wrong
