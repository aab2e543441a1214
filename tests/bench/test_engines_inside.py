"""`make engines-inside` on a small layer: rows are measured and planned, deviations found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_slice import SMALL_SLICE
from tests.helpers.source import ROOT
from twotower.checkpoint.synthetic import published_slice

SMALL = {**SMALL_SLICE, "hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64}


@pytest.fixture
def tool(tools: Any) -> Any:
    return tools("engines_inside")


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_a_small_layer_through_the_whole_command(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("{}\nold\n{}\n".format(*tool.MARKS))
    words = ["--scratch", str(tmp_path / "scratch"), "--recipes", "int4-experts"]
    words += ["--write-docs", str(page)]
    assert tool.main(words, {**published_slice("E*"), **SMALL}) == 0
    out = capsys.readouterr().out
    assert out.count("| `int4-experts` |") == 2
    assert "old" not in page.read_text()
    assert page.read_text().count("| `int4-experts` |") == 2
    assert not (tmp_path / "scratch").exists()


def test_a_plan_that_is_too_low_or_far_too_high_is_found(tool: Any) -> None:
    row = tool.Row("int8", "context", 10**9, 3 * 10**9, 3_300_000_000, 5.0, 6.0, 10**9)
    assert tool.fits(row)
    assert not tool.fits(replace(row, planned_memory=2_990_000_000))
    assert not tool.fits(replace(row, planned_memory=4_200_000_000))


def test_the_table_in_the_documents_is_one_the_tool_wrote(tool: Any) -> None:
    text = (ROOT / "docs" / "measurements" / "engines.md").read_text(encoding="utf-8")
    table = text.partition(tool.MARKS[0])[2].partition(tool.MARKS[1])[0].strip().splitlines()
    assert table[:2] == tool.table([]).splitlines()
    recipes = [line.split("|")[1].strip() for line in table[2:]]
    assert recipes == ["`int4-experts`"] * 2 + ["`int8`"] * 2
