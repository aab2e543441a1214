"""The walk through the code names functions that are there, and passes few files."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType

import pytest

from tests.helpers.bundles import built_fixture
from tests.helpers.source import ROOT
from twotower import GenerationConfig, TwoTower

PAGE = ROOT / "docs" / "walkthrough.md"
NAMED = sorted(
    set(re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/.]+\.py)\)", PAGE.read_text(encoding="utf-8")))
)
STEPS = sorted(set(re.findall(r"`(BlockLoop\._\w+)`", PAGE.read_text(encoding="utf-8"))))


@cache
def names_of(file: Path) -> frozenset[str]:
    """Functions, classes and methods a file defines, methods as `Class.method`."""
    out = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            out |= {f"{node.name}.{method.name}" for method in methods}
    return frozenset(out)


def test_the_walk_names_what_it_walks_by() -> None:
    assert len(NAMED) > 50
    assert len(STEPS) >= 3


@pytest.mark.parametrize(
    ("name", "file"),
    [*NAMED, *((step, "runtime/loop.py") for step in STEPS)],
    ids=lambda part: part if "/" not in part else "",
)
def test_what_is_named_is_defined_there(name: str, file: str) -> None:
    assert name in names_of(ROOT / file)


def test_a_token_passes_few_files(tmp_path: Path) -> None:
    """Of a session that has allocated its buffers: from `generate` to the engine call and back."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")  # also of what a dataclass generates
        if event == "call" and module.startswith("twotower."):
            entered.add(module.removeprefix("twotower."))

    config = GenerationConfig(max_new_tokens=32, ignore_eos=True)
    with TwoTower.open(built_fixture("hybrid-a", tmp_path / "b").path, "ort-cpu") as model:
        model.generate([5, 6, 7], config)
        sys.setprofile(note)
        try:
            model.generate([5, 6, 7], config)
        finally:
            sys.setprofile(None)
    assert {"runtime.session", "runtime.loop", "runtime.workspace", "runtime.engines.ort"} < entered
    assert len(entered) <= 11, sorted(entered)
