"""Mutants of a few lines, by hand; and one that tests notice beside one that they do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.source import ROOT
from tools.mutants import EQUIVALENT, PACKAGE, SUBJECTS, mutants_of

SOURCE = '''"""A module: 1 + 1 in words."""
LIMIT: tuple[int | None, ...] = (3, None)

def f(x: int | None = 0, *, strict=True):
    """Not 2 < 3."""
    assert x != 5, f"{x + 1}"
    if x and not strict:
        raise ValueError(x + 1)
    return list(zip([min(x, 2)], [-x], strict=True))
'''


def test_every_change_of_a_few_lines() -> None:
    """Neither annotations, docstrings, asserts, errors nor `strict` of a zip."""
    assert [mutant.change for mutant in mutants_of(SOURCE)] == [
        "(3, None) -> (4, None)",
        "x: int | None=0, *, strict=True -> x: int | None=0, *, strict=False",
        "x: int | None=0, *, strict=True -> x: int | None=1, *, strict=True",
        "x and (not strict) -> x or not strict",
        "not strict -> not not strict",
        "min(x, 2) -> max(x, 2)",
        "min(x, 2) -> min(x, 3)",
        "-x -> +x",
    ]


@pytest.mark.slow
def test_a_change_that_is_noticed_and_one_that_is_not() -> None:
    """Of the real tool on a real module, whose tests are few here."""
    code = """
import sys
from tools import mutants
mutants.SUBJECTS = {"builders/profiles": ["tests/builders/test_profiles.py::test_a_cache_holds_a_chunk_more_in_whole_lines"]}
keep = ("max_context > longest -> max_context >= longest", "max(2, max_batch) -> min(2, max_batch)")
every = mutants.mutants_of
mutants.mutants_of = lambda source: [m for m in every(source) if m.change in keep]
sys.exit(mutants.main(["builders/profiles"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "1 of 2 noticed" in done.stdout
    assert "max(2, max_batch) -> min(2, max_batch)" in done.stdout


@pytest.mark.slow
def test_what_is_listed_is_there() -> None:
    """Modules, their tests, and mutants that are said to be none."""
    for name, tests in SUBJECTS.items():
        assert all((ROOT / test.partition("::")[0]).exists() for test in tests)
        changes = {
            mutant.change
            for mutant in mutants_of((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        }
        assert set(EQUIVALENT.get(name, {})) <= changes, name
