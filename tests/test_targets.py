"""The targets that run tests leave none out, and the continuous integration runs all of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product

import pytest

from tests.helpers.source import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RECIPE = r"^(test[a-z-]*|kernels): .*\n\t.* -m \"?([^\"$]+?)\"?((?: tests/\S+)*)(?: --cpu-limit \d+)? \$\(ARGS\)$"
RECIPES = re.findall(RECIPE, MAKEFILE, re.MULTILINE)
TARGETS = {name: expression for name, expression, _ in RECIPES}
FOLDERS = {name: folders.split() for name, _, folders in RECIPES if folders}
NEEDS_A_GPU = {"test-gpu"}
KINDS = ("trained", "wheel", "browser", "kernels", "trt_rtx", "slow")
TOGETHER = {
    "test-long": ("test-trained", "test-engines", "test-browser"),
    "test-all": ("test", "test-long"),
}
"""What is run at once, and what it consists of."""

TOO_LONG = {"kernels"}
"""Takes ten minutes: run by who changes a kernel."""


def chosen_by(target: str, marks: tuple[bool, ...]) -> bool:
    return bool(eval(TARGETS[target], {"__builtins__": {}}, dict(zip(KINDS, marks, strict=True))))


def chosen_by_any(targets: Iterable[str], marks: tuple[bool, ...]) -> bool:
    return any(chosen_by(target, marks) for target in targets)


def every_set_of_marks() -> list[tuple[bool, ...]]:
    return list(product((False, True), repeat=len(KINDS)))


def test_every_test_is_in_a_target_whatever_its_marks() -> None:
    assert len(TARGETS) == 11
    for marks in every_set_of_marks():
        assert chosen_by_any(set(TARGETS) - NEEDS_A_GPU, marks), marks


def test_the_continuous_integration_runs_every_target() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = re.findall(r"(?m)^(?:\w+=\w+ )?make ((?:--\S+ )*[a-z -]+?)(?: #.*)?$", script)
    run = {target for line in lines for target in line.split()}
    assert run >= {"lint", "types", "wheel"}
    for marks in every_set_of_marks():
        for target in set(TARGETS) - NEEDS_A_GPU - TOO_LONG:
            if chosen_by(target, marks):
                assert chosen_by_any(run & set(TARGETS), marks), (target, marks)


@pytest.mark.parametrize("target", TOGETHER)
def test_what_is_run_at_once_is_its_parts(target: str) -> None:
    for marks in every_set_of_marks():
        assert chosen_by(target, marks) == chosen_by_any(TOGETHER[target], marks), marks


def test_a_target_that_names_folders_names_all_with_its_mark() -> None:
    for target, folders in FOLDERS.items():
        paths = [ROOT / folder for folder in folders]
        every = (ROOT / "tests").rglob("test_*.py")
        outside = [f for f in every if not any(map(f.is_relative_to, paths))]
        mark = f"pytest.mark.{TARGETS[target]}"
        wrong = {f.name for f in outside if mark in f.read_text(encoding="utf-8")}
        assert wrong <= {"test_targets.py", "test_account.py"}, f"make {target} leaves these out"
