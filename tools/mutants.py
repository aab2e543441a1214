"""Changes one token of a module at a time and asks whether its tests notice; `make mutants`.

    python -m tools.mutants                     all modules of SUBJECTS
    python -m tools.mutants runtime/schedule    some

A mutant is one changed operator, comparison, number, condition or `min`/`max`; annotations,
messages of errors and asserts are left alone. It is loaded by an import hook, in a process forked
for it: no file is changed. What survives is printed. A change that changes no behaviour is listed
in EQUIVALENT, with why, and does not count.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "twotower"
LEAST = 0.9

SUBJECTS: Mapping[str, Sequence[str]] = {
    "runtime/schedule": ["tests/runtime/test_schedule.py"],
    "runtime/sampling": ["tests/runtime/test_sampling.py"],
    "runtime/rows": ["tests/runtime/test_rows.py"],
    "calibration/ranges": ["tests/calibration/test_activation_statistics.py"],
    "planning/fit": ["tests/planning/test_fit.py"],
    "planning/scratch": ["tests/planning/test_scratch.py"],
    "builders/trt/cut": ["tests/builders/trt/test_cut.py"],
    "builders/profiles": ["tests/builders/test_profiles.py"],
    "export/graphs/sampler": ["tests/export/test_graphs.py"],
}
"""Module below src/twotower -> the tests that must notice what is changed in it."""

_FOUND_EARLIER = "a stop string that ends further left was found when its last token came"
_NEVER_WHOLE = "the text does not end with a whole stop string: the row would have ended"
_GROUPED = "in what groups rows are drawn is a matter of time"
_SET_ANEW = "it is set anew for every row"
EQUIVALENT: Mapping[str, Mapping[str, str]] = {
    "runtime/sampling": {
        "kept - kept[0] -> kept + kept[0]": "the same shift of all candidates",
        "self.top_p < 1 -> self.top_p <= 1": "all candidates are before the whole sum",
        "self.top_p < 1 -> self.top_p < 2": "likewise; no top_p is above 1",
        "_TOGETHER = 8192 -> _TOGETHER = 8193": _GROUPED,
        "min(_TOGETHER // count, sum(self._sampled)) -> max(_TOGETHER // count, sum(self._sampled))": _GROUPED,
        "_TOGETHER // count -> _TOGETHER * count": _GROUPED,
        "max(min(_TOGETHER // count, sum(self._sampled)), 1) -> max(min(_TOGETHER // count, sum(self._sampled)), 2)": _GROUPED,
        "np.random.Philox(0) -> np.random.Philox(1)": _SET_ANEW,
        "[0, 0] -> [1, 0]": _SET_ANEW,
        "[0, 0, 0, 0] -> [1, 0, 0, 0]": "of the buffer, which counts as read to its end",
        "[0, 0, 0, 0] -> [0, 1, 0, 0]": f"likewise; of the counter, {_SET_ANEW}",
        "[0, 0, 0, 0] -> [0, 0, 1, 0]": f"likewise; of the counter, {_SET_ANEW}",
        "[0, 0, 0, 0] -> [0, 0, 0, 1]": f"likewise; of the counter, {_SET_ANEW}",
        "-1 -> -2": "any negative length is the one that is left",
    },
    "runtime/rows": {
        "searched - len(string) + 1 -> searched - len(string) - 1": _FOUND_EARLIER,
        "len(string) - 1 -> len(string) + 1": _NEVER_WHOLE,
        "min(len(string) - 1, len(self._text)) -> max(len(string) - 1, len(self._text))": _NEVER_WHOLE,
        "min(len(string) - 1, len(self._text)) + 1 -> min(len(string) - 1, len(self._text)) + 2": _NEVER_WHOLE,
        "self._started = 0.0 -> self._started = 1.0": "a row is started before it takes anything",
    },
    "builders/trt/cut": {
        "max(sum(weights), 1) -> max(sum(weights), 2)": "layers without bytes are in the first group by any sum",
    },
    "planning/fit": {
        "few <= set(changes.items()) -> few < set(changes.items())": "no two sets of changes are the same",
    },
    "export/graphs/sampler": {
        "-1e+30 -> -1e+30": "one more is nothing there",
        "graph.constant(1.0, 'float32') -> graph.constant(2.0, 'float32')": "what a greedy row divides by is not looked at",
        "[0.0] -> [1.0]": "the same shift of all tokens but the mask, which never competes",
        "-1 -> +1": "the last of two axes",
    },
    "calibration/ranges": {
        "1: -> 2:": "of 65 candidates below the greatest the smallest is left out: a range of a 256th",
        "last - 64 -> last - 65": "one candidate more, smaller than a 256th of the greatest",
        "last + 1 -> last + 2": "one more, which is cut to the greatest and is there already",
        "middles[0] -> middles[1]": "magnitudes below 2^-24 count as their middle, which rounds to zero in every range from 2^-20 on",
        "values[None] > steps / 2 -> values[None] >= steps / 2": "no middle of a bin is half a step of an edge of one",
    },
}
"""Module -> mutant -> why it is none."""

_SWAPPED: Mapping[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
_COMPOUND = (ast.If, ast.While, ast.For, ast.With, ast.FunctionDef, ast.ClassDef, ast.Module)
_TOLD_APART = (ast.Compare, ast.UnaryOp, ast.BoolOp)
_QUIET = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
        line: Where.
        change: The smallest expression around it, before and after.
        tree: The changed module.
    """

    line: int
    change: str
    tree: ast.Module


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what survives; returns 1 where less than LEAST of a module's mutants are noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modules",
        nargs="*",
        default=list(SUBJECTS),
        metavar="MODULE",
        help="modules of SUBJECTS (all)",
    )
    args = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["CI"] = "1"  # hypothesis draws the same examples every time
    sys.dont_write_bytecode = True
    return int(bool([name for name in args.modules if _report(name) < LEAST]))


def _report(name: str) -> float:
    """Prints the survivors of one module; returns the share of its mutants that are noticed."""
    subject = Subject(name, SUBJECTS[name])
    known = EQUIVALENT.get(name, {})
    mutants = [
        m
        for m in mutants_of((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        if m.change not in known
    ]
    survivors = [m for m in mutants if not subject.notices(m)]
    share = 1 - len(survivors) / max(len(mutants), 1)
    print(
        f"{name}: {len(mutants) - len(survivors)} of {len(mutants)} noticed, {100 * share:.0f} %, {len(known)} equivalent",
        flush=True,
    )
    for mutant in survivors:
        print(f"  line {mutant.line}: {mutant.change}", flush=True)
    return share


class Subject:
    """A module and its tests, which pass while it is as it is.

    Args:
        name: Module below src/twotower, with slashes.
        tests: Files or tests for pytest.
    """

    def __init__(self, name: str, tests: Sequence[str]) -> None:
        self.name = name
        self.file = PACKAGE / f"{name}.py"
        self.tests = [*tests]
        self._preload()
        started = time.monotonic()
        status = self._status(None, limit=600)
        self._limit = 10 + 5 * (time.monotonic() - started)
        if status:
            raise SystemExit(
                f"error: the tests of {name} fail without any change: pytest {' '.join(tests)}"
            )

    def notices(self, mutant: Mutant) -> bool:
        """Whether a test fails, or never ends."""
        return self._status(mutant.tree, limit=self._limit) != 0

    def _preload(self) -> None:
        """Imports here, once, what other people's libraries the tests import: forked processes have them."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            self._test(None)
            theirs = {
                n.split(".")[0]
                for n, m in sys.modules.items()
                if "site-packages" in (getattr(m, "__file__", None) or "")
            }
            os.write(writer, " ".join(theirs).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as names:
            for name in names.read().split():
                with suppress(ImportError):
                    importlib.import_module(name)
        os.waitpid(child, 0)

    def _status(self, tree: ast.Module | None, *, limit: float) -> int:
        """What the tests end with; 0 if they pass."""
        child = os.fork()
        if not child:
            os.setsid()
            os._exit(self._test(tree))
        until = time.monotonic() + limit
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    def _test(self, tree: ast.Module | None) -> int:
        """In a process of its own: the tests, silently."""
        if tree is not None:
            module = f"twotower.{self.name.replace('/', '.')}"
            sys.meta_path.insert(
                0,
                _Hook(
                    module,
                    self.file,
                    compile(ast.fix_missing_locations(tree), str(self.file), "exec"),
                ),
            )
        os.chdir(ROOT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        return int(
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *self.tests])
        )


class _Hook(importlib.machinery.SourceFileLoader):
    """Finds and loads one module, with code that is not its file's."""

    def __init__(self, name: str, file: Path, code: CodeType) -> None:
        super().__init__(name, str(file))
        self._code = code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.util.spec_from_file_location(name, self.path, loader=self)
            if name == self.name
            else None
        )

    def get_code(self, fullname: str) -> CodeType:
        return self._code


def mutants_of(source: str) -> Iterator[Mutant]:
    """Every mutant of a module's text."""
    for number in range(len(list(_sites(ast.parse(source))))):
        tree = ast.parse(source)
        site = list(_sites(tree))[number]
        before = site.shown()
        site.change()
        yield Mutant(site.line, f"{before} -> {site.shown()}", tree)


@dataclass(frozen=True)
class _Site:
    """A place that can be changed: where it is, how it reads, and what changes it."""

    line: int
    shown: Callable[[], str]
    change: Callable[[], None]


def _sites(node: ast.AST) -> Iterator[_Site]:
    """Places below a node that can be changed."""
    for child in _code_below(node):
        whole = child
        if isinstance(child, (ast.Constant, ast.Name)) and not isinstance(node, _COMPOUND):
            whole = node
        shown, line = partial(ast.unparse, whole), getattr(whole, "lineno", 0)
        yield from (_Site(line, shown, change) for change in _changes(child))
        if isinstance(child, (ast.If, ast.While, ast.IfExp)) and not isinstance(
            child.test, _TOLD_APART
        ):
            negated = _setter(child, "test", ast.UnaryOp(ast.Not(), child.test))
            yield _Site(child.lineno, partial(_condition, child), negated)
        yield from _sites(child)


def _condition(node: ast.If | ast.While | ast.IfExp) -> str:
    return f"if {ast.unparse(node.test)}"


def _code_below(node: ast.AST) -> Iterator[ast.AST]:
    """Children that are neither annotations, decorators, docstrings nor words for people."""
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assert by another name
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not docstring and not isinstance(child, _QUIET):
                yield child


def _changes(node: ast.AST) -> Iterator[Callable[[], None]]:
    """What can be changed of a node itself."""
    if isinstance(node, ast.Compare):
        yield from (
            _setter(node, "ops", [*node.ops[:i], _SWAPPED[type(op)](), *node.ops[i + 1 :]])
            for i, op in enumerate(node.ops)
        )
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in _SWAPPED:
        yield _setter(node, "op", _SWAPPED[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _setter(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield _setter(node, "op", ast.UAdd())
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield _setter(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield _setter(node, "value", node.value + 1)
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield _setter(node, "id", _NAMES[node.id])


def _setter(node: ast.AST, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


if __name__ == "__main__":
    sys.exit(main())
