"""`make engines-real` and `make engines-boundary` on small slices: rows are kept, the table is written, what is off is found."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.source import ROOT

SMALL = {
    "hidden_size": 64,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
ROW = {
    "slice": "E*",
    "engine": "denoiser.engine",
    "bound": 10_000_000_000,
    "weights": 3_000_000_000,
    "planned": {"peak": 9_400_000_000, "seconds": 13.0, "size": 3_010_000_000},
    "peak": 9_000_000_000,
    "seconds": 12.0,
    "size": 3_000_000_000,
    "unexplained": [],
}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_a_small_slice_through_the_whole_command(tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, slices = tools("engines_real"), tools("engines_slices")
    document = tmp_path / "page.md"
    document.write_text(f"before\n{real.BEGIN}\nold\n{real.END}\nafter\n")
    words = ["--output", str(tmp_path / "out"), "--write-docs", str(document)]
    piece = (slices.Slice(name="E*", changes=SMALL),)
    assert real.main(words, piece) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["context.engine", "context_head.engine", "denoiser.engine"]
    for row in rows:
        assert row["sms"] == [89, 120]
        assert not row["unexplained"]
        assert row["size"] > row["weights"] > 0
        assert 0 < row["anonymous"] < row["peak"]
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `E*` | denoiser |" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["results.jsonl"], "scratch is gone"
    before = (tmp_path / "out" / "results.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert real.main(words, piece) == 0
    assert "building" not in capsys.readouterr().err
    assert (tmp_path / "out" / "results.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"peak": 7_500_000_000}, "peak planned 9.4e+09, measured 7.5e+09"),
        ({"peak": 9_500_000_000}, "peak planned"),
        ({"peak": 9_100_000_000, "bound": 9_000_000_000}, "9.00 GB allowed"),
        ({"seconds": 20.0}, None),
        ({"size": 2_000_000_000}, "size planned"),
        ({"unexplained": ["a word"]}, "unexplained warning: a word"),
        ({"weights": 1000, "peak": 100_000_000, "seconds": 1.0, "size": 5}, None),
    ],
)
def test_what_is_off_is_found(tools: Any, change: dict[str, Any], says: str | None) -> None:
    problems = tools("engines_real").problems_of({**ROW, **change})
    assert [says in p for p in problems] == ([True] if says else [])


def test_seconds_are_held_in_all(tools: Any) -> None:
    off = tools("engines_real").seconds_off
    assert off([ROW, {**ROW, "seconds": 16.0}]) == []
    assert "26 s planned, 40 s measured" in off([{**ROW, "seconds": 20.0}] * 2)[0]
    assert off([{**ROW, "weights": 1000, "seconds": 100.0}]) == []


def test_a_document_without_a_place_for_the_table_is_left_alone(tools: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="no place"):
        tools("engines_real").write_table(page, "| a |")
    assert page.read_text() == "nothing"


def test_the_table_in_the_documents_is_one_the_tool_wrote(tools: Any) -> None:
    real = tools("engines_real")
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    table = text.partition(real.BEGIN)[2].partition(real.END)[0].strip().splitlines()
    assert table[0] == real.table([]).splitlines()[0]
    slices = {line.split("`")[1] for line in table[2:] if line.startswith("|")}
    assert slices == {s.name for s in tools("engines_slices").SLICES}


def test_a_cut_slice_computes_the_same(tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--pattern", "M*E", "--experts", "6", "--width", "128", "--runs", "1", "--scratch", str(tmp_path / "scratch")]
    assert tools("engines_boundary").main(words) == 0
    out = capsys.readouterr().out
    assert "3 pieces" in out
    assert "the same to the bit" in out
    assert not (tmp_path / "scratch").exists()
