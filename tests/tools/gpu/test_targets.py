"""The questions to a target, put to `ort-cpu` here; on a GPU they are put to the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.small_slice import SMALL_SLICE
from tools.gpu import targets
from tools.gpu.questions import GPU_TARGETS, Given
from twotower import TwoTower
from twotower.doctor import Answers, SkipSectionError


def asked(name: str, work: Path) -> Answers:
    answers = Answers(work / "answers.json", 600)
    targets.ask(answers, Given(name=name, pack=(), work=work))
    return answers


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Numbers of rows that models are warmed up for, of each that is opened from now on."""
    rows: list[Any] = []

    def opened(path: Path, **options: Any) -> TwoTower:
        rows.append(options.get("warm_up"))
        return TwoTower.open(path, **options)

    monkeypatch.setattr(targets, "TwoTower", SimpleNamespace(open=opened))
    return rows


@pytest.mark.parametrize("target", GPU_TARGETS)
def test_without_a_gpu_the_reason_is_given(tmp_path: Path, target: str) -> None:
    with pytest.raises(SkipSectionError, match=r"is not installed|no NVIDIA GPU"):
        asked(f"goldens-{target}", tmp_path)


@pytest.mark.slow
def test_recorded_tokens_are_counted(tmp_path: Path, warmed: list[Any]) -> None:
    (table,) = asked("goldens-ort-cpu", tmp_path)["tables"]
    assert [row[0] for row in table["rows"]] == ["hybrid-a", "hybrid-b"]
    for _, _, diffusion, ar in table["rows"]:
        right, of, all_ = diffusion.split()
        assert (right, of) == (all_, "of")
        assert ar == diffusion
    assert warmed == [(), ()], "no kernels are compiled that nothing runs"


@pytest.mark.slow
def test_both_ways_are_asked_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a build without a word first; on a CPU both are the same."""
    monkeypatch.setitem(targets.WAYS, "ort-cpu", ("", "dense"))
    (table,) = asked("goldens-ort-cpu", tmp_path)["tables"]
    assert [row[0] for row in table["rows"]] == 2 * ["hybrid-a", "hybrid-b"]
    folders = {path.name for path in (tmp_path / "targets").iterdir()}
    names = ("hybrid-a-float32", "hybrid-b-float32")
    assert folders == {*names, *(f"{name}-dense" for name in names)}
    answers = Answers(tmp_path / "answers.json", 5)
    ways = list(targets.Asked("ort-cpu", tmp_path).ways(answers))
    assert [way.experts for way in ways] == [""]
    assert "no time left" in answers["summary"][0]


@pytest.mark.parametrize(("experts", "computed"), [("", "fused"), ("dense", "dense")])
def test_onnx_runtime_is_asked_for_each_way(tmp_path: Path, experts: str, computed: str) -> None:
    """Kernels are the third way: what compiles them is tested elsewhere."""
    ways = {way.experts: way for way in targets.Asked("ort-cuda", tmp_path).ways()}
    assert list(ways) == ["", "dense", "kernels"]
    path = targets.built(targets.FIXTURES / "hybrid-a", ways[experts], "float16")
    assert targets._computed(path, "ort-cuda") == computed


@pytest.mark.slow
def test_half_precision_is_checked_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmed: list[Any]
) -> None:
    monkeypatch.setattr(targets, "_PROBLEMS", 1)
    monkeypatch.setattr(targets, "HALF", ("float16",))
    (table,) = asked("half-ort-cpu", tmp_path)["tables"]
    rows = {row[2]: row for row in table["rows"]}
    assert rows["reference answer"][3] is True
    assert rows["the text of float32, diffusion"][4].endswith(" % of prompts")
    assert () in warmed


@pytest.mark.slow
def test_a_pass_at_the_widths_of_a_slice_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmed: list[Any]
) -> None:
    monkeypatch.setattr(targets, "CHANGES", SMALL_SLICE)
    answers = asked("real-ort-cpu", tmp_path)
    assert answers["dtype"] == "bfloat16"
    ((computed, passes),) = answers["passes"].items()
    assert passes["denoise_ms"] > 0
    assert answers["tables"][0]["rows"][0][:2] == [
        computed,
        pytest.approx(passes["denoise_ms"], rel=1e-3),
    ]
    assert "ms a denoiser pass" in answers["summary"][0]
    assert warmed == [()], "seconds of opening are without those of passes"
