"""Figures of source code, on code whose figures are plain."""

from __future__ import annotations

from typing import Any

import pytest

from tools import house_numbers as tool


@pytest.fixture
def modules() -> Any:
    sources = {
        "twotower": "",
        "twotower.a": '"""One."""\nfrom twotower.rooms.b import twice\n\nx = _once(1)\n\n\ndef _once(y):\n    # why\n    return y\n',
        "twotower.rooms": "",
        "twotower.rooms.b": "def _often(z, *, w):\n    return z\n\n\ndef twice():\n    return _often(_often(1))\n",
        "twotower.rooms.a": "import twotower.rooms.b\n",
        "twotower.cli": "",
        "twotower.cli.verb": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import twotower.a\n",
    }
    return [tool.Module(name, text) for name, text in sources.items()]


def test_importers(modules: Any) -> None:
    imports = tool._imports(modules)
    assert imports["twotower.a"] == {"twotower.rooms.b"}
    assert imports["twotower.cli.verb"] == set(), "what is imported for types alone is not"
    importers = {
        "twotower.a": 0,
        "twotower.rooms.a": 0,
        "twotower.rooms.b": 2,
        "twotower.cli.verb": 1,
    }
    assert tool._importers(modules, imports) == importers
    assert {module.name for module in tool._leaves(modules)} == set(importers)


def test_cycles() -> None:
    assert tool._cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == 1
    assert tool._cycles({"a": {"b"}, "b": set(), "c": {"a", "b"}}) == 0


def test_helpers_arguments_and_density(modules: Any) -> None:
    assert tool._used_once(modules) == (1, 2)
    assert sorted(tool._arguments(modules)) == [0, 1, 2]
    (a,) = (module for module in modules if module.name == "twotower.a")
    # Lines: the import, the assignment, the definition, the return. Statements: these four.
    # Expressions: x, the call, its name
    # and argument, and y.
    assert tool._density([a]) == pytest.approx(9 / 4)
    assert [*tool._function_lengths(a)] == [3]


@pytest.mark.parametrize(
    ("values", "percent", "want"),
    [([1, 2, 3, 4], 90, 4), ([1] * 95 + [9] * 5, 90, 1), ([7], 50, 7)],
)
def test_percentiles(values: list[int], percent: int, want: int) -> None:
    assert tool._percentile(values, percent) == want
