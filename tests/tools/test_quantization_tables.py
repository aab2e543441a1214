"""The table of builds: a refusal is a cell, and a build that was cut short leaves no table."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.source import ROOT
from twotower.builders.trt import make_engine
from twotower.bundle import Bundle
from twotower.errors import BuildAbortedError, BuildError


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("quantization_tables")


def refuse(*_: Any, **__: Any) -> None:
    raise BuildError("fp8 weights of SM 86", found="from SM 89 on", do="choose another recipe")


def bench(bundle: Bundle) -> Any:
    return SimpleNamespace(half=bundle, quantized=lambda *_, **__: bundle)


def test_what_the_library_refuses_is_a_cell(
    tool: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "builder_for", lambda target: None)
    monkeypatch.setattr(tool, "build_engines", refuse)
    rows = tool.builds(bench(Bundle.open(tiny_bundle)))
    assert len(rows) == 2 + len(tool.builtin_recipes())
    assert all(
        row.count("refused: fp8 weights (from SM 89 on)") == len(tool.SMS) for row in rows[2:]
    )


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGSEGV, 1])
def test_a_build_whose_process_died_is_no_cell(
    tool: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def died(*_: Any, **__: Any) -> None:
        raise make_engine._died(code, [])

    monkeypatch.setattr(tool, "builder_for", lambda target: None)
    monkeypatch.setattr(tool, "build_engines", died)
    with pytest.raises(BuildAbortedError):
        tool.builds(bench(Bundle.open(tiny_bundle)))
