"""`make engines-published` and `make engines-boundary` on small models: figures and deviations."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.source import ROOT

SMALL = ROOT / "tests" / "fixtures" / "hybrid-a" / "config.json"


@pytest.fixture(scope="module")
def case(tools: Any) -> Any:
    # Planned scratch is held at published widths only.
    limits = {"seconds": 100, "memory": 10**9, "nbytes": 10**8}
    kernels = {"denoise": 200, "block": 200}
    return tools("engines_published").Case(
        name="a model", config=SMALL, sms=(86, 120), planned=False, kernels=kernels, **limits
    )


@pytest.fixture(scope="module")
def built(tools: Any, case: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    scratch = tmp_path_factory.mktemp("published")
    made = tools("engines_published").build(case, scratch)
    assert not list(scratch.iterdir()), "what was built is removed"
    return made


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_a_small_model_through_the_whole_command(
    tools: Any,
    case: Any,
    built: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """But for the build, which `built` has made."""
    tool = tools("engines_published")

    def build(case: Any, scratch: Path) -> Any:
        assert not list(scratch.iterdir())
        return replace(built, case=case)

    monkeypatch.setattr(tool, "build", build)
    document = tmp_path / "page.md"
    document.write_text("before\n{}\nold\n{}\nafter\n".format(*tool.MARKS))
    words = ["--output", str(tmp_path / "out"), "--write-docs", str(document)]
    assert tool.main(words, [case]) == 0
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "for SM 86, 120" in text
    assert text.count("| denoiser, denoise |") == 1
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert tool.main(words, [replace(case, kernels={"denoise": 10, "block": 200})]) == 1
    assert "a model: denoiser, denoise: " in capsys.readouterr().err


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_programs_with_experts_between_are_told_by_launches(
    tools: Any, case: Any, tmp_path: Path
) -> None:
    pytest.importorskip("triton")  # make EXTRAS=...,kernels
    tool = tools("engines_published")
    made = tool.build(replace(case, experts="kernels", sms=(86,)), tmp_path)
    assert tool.problems_of(made) == []
    lines = tool.told(made).splitlines()
    (line,) = [line for line in lines if line.startswith("| denoiser, denoise |")]
    programs, files, kernels, one_row, most = (int(cell) for cell in line.split(" | ")[1:6])
    assert (programs, files) == (4, 4)
    assert (one_row, most) == (kernels + 12, kernels + 12)
    tight = replace(made, case=replace(made.case, kernels={"denoise": most - 1}))
    assert tool.problems_of(tight) == [f"denoiser, denoise: {most} launches, allowed {most - 1}"]


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_a_build_within_its_figures_has_no_problems(tools: Any, built: Any) -> None:
    assert tools("engines_published").problems_of(built) == []
    assert built.weights > 10**5
    assert 0 < built.ran.cpu_seconds < 100
    assert 10**8 < built.ran.peak_memory < built.memory < 10**9
    names = {(p.graph, p.profile) for p in built.passes}
    profiles = {profile for graph, profile in names if graph == "context"}
    assert profiles == {"prefill", "block", "decode"}
    assert len(names) == 5
    ran = replace(built.ran, seconds=500.0, cpu_seconds=1.0, others=0.5)
    problems_of = tools("engines_published").problems_of
    assert problems_of(replace(built, ran=ran)) == []
    alone = replace(ran, others=0.01)
    assert problems_of(replace(built, ran=alone)) == ["500 seconds, allowed 100"]


@pytest.mark.trt_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("case", {"seconds": 0.01}, "seconds of one processor, allowed 0.01"),
        ("case", {"memory": 10**7}, "bytes of memory"),
        ("case", {"nbytes": 10**5}, "bytes of engines"),
        ("case", {"kernels": {"block": 9}}, "context, block: "),
        ("case", {"sms": (86,)}, "built for SM [86, 120]"),
        ("case", {"planned": True}, "scratch of"),
        ("program", {"streams": 8}, "8 streams"),
        ("program", {"capturable": None}, "not capturable"),
        ("program", {"capturable": False}, "not capturable"),
        ("program", {"expanded": [{}, {}]}, "2 weights expanded in memory"),
    ],
)
def test_what_is_off_is_found(
    tools: Any, built: Any, part: str, change: dict[str, Any], says: str
) -> None:
    first, *others = built.passes
    if part == "case":
        off = replace(built, case=replace(built.case, **change))
    else:
        off = replace(built, passes=(replace(first, program={**first.program, **change}), *others))
    found = tools("engines_published").problems_of(off)
    assert found
    assert all(says in problem or "seconds, allowed" in problem for problem in found)


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_weights_on_disk_warnings_and_programs_nobody_read_are_found(
    tools: Any, built: Any
) -> None:
    problems_of = tools("engines_published").problems_of
    (problem,) = problems_of(replace(built, data=("context/model.onnx.data",)))
    assert problem == "weights on disk: context/model.onnx.data"
    facts = json.loads(json.dumps(built.record.report))
    facts["engines"]["denoiser.engine"]["log"].append({"message": "a word", "explained": None})
    facts["engines"]["context.engine"]["inspector"] = {"why_not": "another layout"}
    unread, odd = problems_of(replace(built, record=replace(built.record, report=facts)))
    assert "another layout" in unread
    assert "a word" in odd


def test_a_command_is_watched(tools: Any) -> None:
    words = "import time; x = bytearray(120_000_000); n = sum(range(10_000_000)); time.sleep(0.3)"
    words += "; raise SystemExit(3)"
    ran = tools("watched_command").run_watched([sys.executable, "-c", words])
    assert ran.code == 3
    assert 0.05 < ran.cpu_seconds < ran.seconds + 0.1
    assert ran.peak_memory > 120_000_000
    assert 0 <= ran.others <= 1.1


def test_the_figures_in_the_documents_are_of_these_cases(tools: Any, tmp_path: Path) -> None:
    tool = tools("engines_published")
    text = (ROOT / "docs" / "measurements" / "engines.md").read_text(encoding="utf-8")
    figures = text.partition(tool.MARKS[0])[2].partition(tool.MARKS[1])[0]
    for case in (tool.published(tmp_path), tool.with_experts_between(tmp_path), tool.SMALL_CASE):
        assert f"Of {case.name} in {case.dtype} " in figures
        assert f"for SM {', '.join(map(str, case.sms))}: " in figures
    assert figures.count("| denoiser, denoise |") == 3


def test_a_cut_slice_computes_the_same(
    tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pattern", "M*E", "--experts", "6", "--width", "128", "--runs", "1", "--scratch"]
    assert tools("engines_boundary").main([*words, str(tmp_path / "scratch")]) == 0
    out = capsys.readouterr().out
    assert "3 pieces" in out
    assert "the same to the bit" in out
    assert not (tmp_path / "scratch").exists()
