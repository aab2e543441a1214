"""`twotower trace` as it is typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.bundles import built_fixture
from tests.helpers.errors import check_error
from tests.helpers.traces import small_trace
from twotower.cli.main import main
from twotower.trace import read_trace, write_trace

PROMPT = ["--tokens", "235 71 245"]
FEW = ["--max-new-tokens", "20", "--threshold", "0.8", "--ignore-eos"]


def test_a_table_of_passes(built_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(built_bundle), *PROMPT, *FEW]) == 0
    captured = capsys.readouterr()
    assert main(["generate", str(built_bundle), *PROMPT, *FEW, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(captured.out.splitlines()) == 1 + result["usage"]["nfe"]
    assert f"{len(result['tokens'])} tokens" in captured.err
    assert main(["trace", str(built_bundle), *PROMPT, *FEW, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["tokens"] == result["tokens"]
    assert len(summary["passes"]) == result["usage"]["nfe"]


def test_files_are_written_and_can_be_shown_again(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page, again = tmp_path / "t.jsonl", tmp_path / "t.html", tmp_path / "again.html"
    assert (
        main(["trace", str(built_bundle), *PROMPT, *FEW, "-o", str(file), "--html", str(page)]) == 0
    )
    assert read_trace(file).header.bundle == "bundle"
    assert main(["trace", str(file), "--html", str(again)]) == 0
    assert again.read_text() == page.read_text()
    assert "://" not in page.read_text().split("<script type")[0]
    assert main(["trace", str(file), "--live"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= len(read_trace(file).steps)


def test_differences_are_shown_and_in_the_exit_code(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["trace", "--diff", str(built_bundle), f"{built_bundle}@ort-cpu", *PROMPT, *FEW]) == 0
    )
    assert "every pass commits the same" in capsys.readouterr().out
    narrow = built_fixture("hybrid-a", tmp_path / "narrow", "bfloat16")
    file = tmp_path / "t.jsonl"
    assert main(["trace", str(built_bundle), *PROMPT, *FEW, "-o", str(file)]) == 0
    capsys.readouterr()
    code = main(["trace", "--diff", str(file), str(narrow.path), "--json"])
    diff = json.loads(capsys.readouterr().out)
    assert code == (0 if diff["block"] is None and diff["tokens_equal"] else 1)
    assert 0 < diff["agreed_to"] < 0.2 or diff["block"] == 0, "bfloat16 is not float32"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["B"], "one prompt"),
        (["B", "text", "--tokens", "5"], "one prompt"),
        (["B", "text"], "tokenizer"),
        (["B", "--tokens", "5", "--mode", "ar"], "ar"),
        (["B", "--tokens", "5", "-o", "no/such/folder/t.jsonl"], "cannot write"),
        (["B", "--tokens", "5", "--html", "no/such/folder/t.html"], "cannot write"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere", "--tokens", "5"], "nowhere"),
        ([], "nothing to trace"),
        (["--diff", "B", "nowhere.jsonl", "--tokens", "5"], "nowhere.jsonl"),
        (["--diff", "B", "B"], "one prompt"),
        (["--diff", "B@toaster", "B", "--tokens", "5"], "toaster"),
        (["--diff", "B", "B", "--tokens", "5", "-o", "t.jsonl"], "a comparison prints"),
        (["--diff", "B", "B", "text", "more"], "a comparison prints"),
    ],
)
def test_what_cannot_be_traced(
    built_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], what: str
) -> None:
    try:
        code = main(
            [
                "trace",
                *(w.replace("B", str(built_bundle)) if w[:2] in ("B", "B@") else w for w in words),
            ]
        )
    except SystemExit as e:  # an option that trace does not have
        assert e.code == 2
        assert what in capsys.readouterr().err
        return
    assert code == 2
    check_error(capsys.readouterr().err, what)


def test_an_older_schema_is_named(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.jsonl"
    assert main(["trace", str(built_bundle), *PROMPT, *FEW, "-o", str(file)]) == 0
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 0', 1))
    capsys.readouterr()
    for words in (
        [str(file), "--html", str(tmp_path / "p.html")],
        ["--diff", str(file), str(file)],
    ):
        assert main(["trace", *words]) == 2
        check_error(capsys.readouterr().err, "schema 0")
    assert not (tmp_path / "p.html").exists()


def test_a_trace_brings_its_own_request(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.jsonl"
    assert main(["trace", str(built_bundle), *PROMPT, *FEW, "-o", str(file)]) == 0
    for words in (
        [str(file), "text"],
        [str(file), *PROMPT],
        [str(file), "--threshold", "0.5"],
        ["--diff", str(file), str(file), *PROMPT],
    ):
        capsys.readouterr()
        assert main(["trace", *words]) == 2
        check_error(capsys.readouterr().err, "options of its own")


def test_what_is_drawn_for_one_side_of_a_comparison_is_used_for_the_other(
    built_bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = [str(built_bundle)] * 2
    assert main(["trace", "--diff", *both, *PROMPT, *FEW, "--temperature", "3"]) == 0
    assert "final tokens: equal" in capsys.readouterr().out


def test_the_first_difference_is_told(
    built_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_trace(a, small_trace())
    steps = list(small_trace().steps)
    steps[1] = replace(
        steps[1], confidence=[0.9, 0.9, 0.7, 0.8999], committed=[], next=steps[1].tokens
    )
    write_trace(b, replace(small_trace(), steps=tuple(steps)))
    assert main(["trace", "--diff", str(a), str(a)]) == 0
    assert "final tokens: equal" in capsys.readouterr().out
    assert main(["trace", "--diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "first difference: block 0, step 1, position 3" in out
    assert "A  committed  token 13 '\\n', confidence 0.970000" in out
    assert "B  left       token 13 '\\n', confidence 0.899900" in out
    assert "margin 0.070000 from the threshold 0.9" in out
    assert main(["trace", "--diff", str(a), str(b), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["a"]["bundle"], facts["equal"], facts["position"], facts["margin_of"]) == (
        "small",
        False,
        3,
        "threshold",
    )


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "t.jsonl", tmp_path / "t.html"
    write_trace(file, small_trace())
    page.write_text("before")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["trace", str(file), "--html", str(page)]) == 2
    check_error(capsys.readouterr().err, "No space left")
    assert page.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.html", "t.jsonl"]
