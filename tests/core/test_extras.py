"""Every optional library has an extra that brings it, and an import that fails names that extra."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires

import pytest

from tests.helpers.source import ROOT, imported, package_files, tree
from twotower.cli import doctor
from twotower.cli.main import main
from twotower.errors import ConfigError
from twotower.extras import EXTRA_OF, TARGET_EXTRA, missing_library, require_libraries
from twotower.hardware import TARGETS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTION = {"cuda": "cuda-bindings", "onnx_ir": "onnx-ir", "tensorrt_rtx": "tensorrt-rtx-cu13"}
WITH_ANOTHER = {"google": "onnx"}
"""Imported names of distributions that another one requires."""


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return found[0]


def brought_by(extra: str) -> Iterator[str]:
    """Distributions that an extra asks for, those of the extras it includes too."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        included = re.match(r"twotower\[(.+)\]", requirement)
        if included:
            yield from brought_by(included[1])
        else:
            yield name_of(requirement)


def test_every_optional_import_has_an_extra() -> None:
    known = {
        *sys.stdlib_module_names,
        "twotower",
        *(name_of(r).replace("-", "_") for r in PROJECT["dependencies"]),
        "google",
    }
    used = {
        name.split(".")[0] for file in package_files().values() for name in imported(tree(file))
    }
    assert used - known == set(EXTRA_OF)


@pytest.mark.parametrize("module", EXTRA_OF)
def test_the_extra_brings_the_library(module: str) -> None:
    distributions = set(brought_by(EXTRA_OF[module]))
    if module in WITH_ANOTHER:
        assert any(name_of(r) == module for r in requires(WITH_ANOTHER[module]) or ())
    assert WITH_ANOTHER.get(module, DISTRIBUTION.get(module, module)) in distributions


def test_every_target_has_an_extra() -> None:
    assert set(TARGET_EXTRA) == set(TARGETS)
    assert set(TARGET_EXTRA.values()) <= set(PROJECT["optional-dependencies"])


def test_what_is_missing_is_said_before_any_work() -> None:
    require_libraries("cpu", "json", "numpy")
    with pytest.raises(ConfigError) as caught:
        require_libraries("evaluate", "numpy", "no_such_library", "no_such_package.part")
    assert caught.value.found == "not installed: no_such_library, no_such_package.part"
    assert caught.value.do == "`pip install 'twotower[evaluate]'`"


def test_an_import_that_fails_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The net under every verb, for a path on which nobody asked beforehand."""

    def fails(name: str) -> None:
        def run(args: object) -> int:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(doctor, "run", run)

    fails("onnx_ir.tape")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "ConfigError: `twotower doctor` needs a library that is not installed here\n"
        "  found: not installed: onnx_ir.tape\n"
        "  do: `pip install 'twotower[export]'`\n"
    )
    fails("twotower.no_such_module")  # our own mistake keeps its stack
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])
    assert missing_library(ModuleNotFoundError("no name")) is None
