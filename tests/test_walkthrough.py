"""The walk through the code names functions that are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.source import ROOT

PAGE = ROOT / "docs" / "walkthrough.md"
NAMED = sorted(
    set(re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/.]+\.py)\)", PAGE.read_text(encoding="utf-8")))
)
PRIVATE = sorted(
    set(
        re.findall(
            r"`(_\w+\.\w+)` in \[\w+\.py\]\(\.\./([\w/.]+\.py)\)", PAGE.read_text(encoding="utf-8")
        )
    )
)


@cache
def names_of(file: Path) -> frozenset[str]:
    """Functions, classes and methods a file defines, methods as `Class.method`."""
    out = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            out |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return frozenset(out)


def test_the_walk_names_what_it_walks_by() -> None:
    assert len(NAMED) > 50
    assert len(PRIVATE) >= 2


@pytest.mark.parametrize(
    ("name", "file"), [*NAMED, *PRIVATE], ids=lambda part: part if "/" not in part else ""
)
def test_what_is_named_is_defined_there(name: str, file: str) -> None:
    assert name in names_of(ROOT / file)
