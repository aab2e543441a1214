"""The targets that run tests leave none out, and the continuous integration runs all of them."""

from __future__ import annotations

import re
from itertools import product

from tests.helpers.source import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = dict(re.findall(r"^(test[a-z-]*|kernels): .*\n\t.* -m \"?([^\"$]+?)\"? (?:tests/kernels )?\$\(ARGS\)$", MAKEFILE, re.MULTILINE))
NEEDS_A_GPU = {"test-gpu"}
KINDS = ("trained", "wheel", "browser", "kernels", "trt_rtx", "slow")
LONG = {"test-trained", "test-engines", "test-browser"}
"""Parts of `test-long`."""

TOO_LONG = {"kernels"}
"""Takes ten minutes: run by who changes a kernel."""


def test_every_test_is_in_a_target_whatever_its_marks() -> None:
    expressions = [expression for name, expression in TARGETS.items() if name not in NEEDS_A_GPU]
    assert len(expressions) == 7
    for marks in product((False, True), repeat=len(KINDS)):
        chosen = dict(zip(KINDS, marks, strict=True))
        assert any(eval(expression, {"__builtins__": {}}, chosen) for expression in expressions), chosen


def test_the_continuous_integration_runs_every_target() -> None:
    (named,) = re.findall(r"^for target in (.+); do$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    first, *others = named.split()
    (parts,) = re.findall(rf"^{first}: ([a-z -]+?) ##", MAKEFILE, re.MULTILINE)
    assert {*parts.split(), *others} >= set(TARGETS) - NEEDS_A_GPU - LONG - TOO_LONG


def test_the_long_tests_are_those_of_their_parts() -> None:
    for marks in product((False, True), repeat=len(KINDS)):
        chosen = dict(zip(KINDS, marks, strict=True))
        scope: dict[str, object] = {"__builtins__": {}}
        assert bool(eval(TARGETS["test-long"], scope, chosen)) == any(eval(TARGETS[part], scope, chosen) for part in LONG)
