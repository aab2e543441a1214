"""What measures a CPU: every line is there, on models small enough for a test."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_slice import SMALL_SLICE
from tests.helpers.source import ROOT
from twotower.checkpoint.synthetic import published_slice


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_a_layer_of_experts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool: Any = importlib.import_module("cpu_experts")
    monkeypatch.setattr(
        tool, "published_slice", lambda pattern: {**published_slice(pattern), **SMALL_SLICE}
    )
    assert (
        tool.main(["--experts", "4", "--tokens", "1,16", "--runs", "1", "--scratch", str(tmp_path)])
        == 0
    )
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("4 experts of 32 x 64")
    assert "chosen, int4" in names
    assert [row.split()[0] for row in rows] == ["1", "16"]
    assert all(float(figure) > 0 for row in rows for figure in row.split()[1:])
    assert not list(tmp_path.iterdir()), "gigabytes at real widths are not left behind"


@pytest.mark.slow
def test_what_auto_costs(
    built_bundle: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool: Any = importlib.import_module("auto_choice")
    monkeypatch.setattr(tool, "SUITE_PROMPTS", 2)
    assert tool.main(["--tiny", str(tiny_bundle), "--mid", str(built_bundle), "--runs", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split(" row")[0] for row in rows] == [
        *(f"suite, {count}" for count in (1, 8)),
        *(f"random weights, {steps} passes, {count}" for steps in (16, 4, 2) for count in (1, 8)),
    ]
    assert all(float(row.split()[-1]) > 0 for row in rows)
