"""`twotower trace` as it is typed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.bundles import built_fixture
from tests.helpers.commands import Commands
from tests.helpers.traces import small_trace
from twotower.trace import read_trace, write_trace

PROMPT = "--tokens '235 71 245'"
FEW = f"{PROMPT} --max-new-tokens 20 --threshold 0.8 --ignore-eos"


@pytest.fixture
def file(built_bundle: Path, tmp_path: Path, cli: Commands) -> Path:
    """A trace of the bundle."""
    path = tmp_path / "t.jsonl"
    cli("trace", built_bundle, FEW, "-o", path)
    return path


def test_a_table_of_passes(built_bundle: Path, cli: Commands) -> None:
    out, err = cli("trace", built_bundle, FEW)
    result = cli.json("generate", built_bundle, FEW)
    assert len(out.splitlines()) == 1 + result["usage"]["nfe"]
    assert f"{len(result['tokens'])} tokens" in err
    summary = cli.json("trace", built_bundle, FEW)
    assert summary["tokens"] == result["tokens"]
    assert len(summary["passes"]) == result["usage"]["nfe"]


def test_files_are_written_and_can_be_shown_again(
    built_bundle: Path, tmp_path: Path, cli: Commands
) -> None:
    file, page, again = tmp_path / "t.jsonl", tmp_path / "t.html", tmp_path / "again.html"
    cli("trace", built_bundle, FEW, "-o", file, "--html", page)
    assert read_trace(file).header.bundle == "bundle"
    cli("trace", file, "--html", again)
    assert again.read_text() == page.read_text()
    assert "://" not in page.read_text().split("<script type")[0]
    assert len(cli("trace", file, "--live").out.splitlines()) >= len(read_trace(file).steps)


def test_differences_are_shown_and_in_the_exit_code(
    built_bundle: Path, file: Path, tmp_path: Path, cli: Commands
) -> None:
    out = cli(f"trace --diff {built_bundle} {built_bundle}@ort-cpu", FEW).out
    assert "every pass commits the same" in out
    half = built_fixture("hybrid-a", tmp_path / "half", "bfloat16")
    diff = cli.json("trace --diff", file, half.path, code=1)
    assert not diff["equal"], "bfloat16 is not float32"
    assert 0 < diff["agreed_to"] < 0.2 or diff["block"] == 0


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("B", "one prompt"),
        ("B text --tokens 5", "one prompt"),
        ("B text", "tokenizer"),
        ("B --tokens 5 --mode ar", "ar"),
        ("B --tokens 5 -o no/such/folder/t.jsonl", "cannot write"),
        ("B --tokens 5 --html no/such/folder/t.html", "cannot write"),
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("nowhere --tokens 5", "nowhere"),
        ("", "nothing to trace"),
        ("--diff B nowhere.jsonl --tokens 5", "nowhere.jsonl"),
        ("--diff B B", "one prompt"),
        ("--diff B@toaster B --tokens 5", "toaster"),
        ("--diff B B --tokens 5 -o t.jsonl", "a comparison prints"),
        ("--diff B B text more", "a comparison prints"),
    ],
)
def test_what_cannot_be_traced(built_bundle: Path, cli: Commands, words: str, what: str) -> None:
    cli.refused("trace", words.replace("B", str(built_bundle)), what=what)


def test_a_trace_brings_its_own_request(file: Path, cli: Commands) -> None:
    for words in ("F text", f"F {PROMPT}", "F --threshold 0.5", f"--diff F F {PROMPT}"):
        cli.refused("trace", words.replace("F", str(file)), what="options of its own")


def test_what_is_drawn_for_one_side_of_a_comparison_is_used_for_the_other(
    built_bundle: Path, cli: Commands
) -> None:
    out = cli("trace --diff", built_bundle, built_bundle, FEW, "--temperature 3").out
    assert "final tokens: equal" in out


def test_the_first_difference_is_shown(tmp_path: Path, cli: Commands) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_trace(a, small_trace())
    steps = list(small_trace().steps)
    sure = [0.9, 0.9, 0.7, 0.8999]
    steps[1] = replace(steps[1], confidence=sure, committed=[], next=steps[1].tokens)
    write_trace(b, replace(small_trace(), steps=tuple(steps)))
    assert "final tokens: equal" in cli("trace --diff", a, a).out
    out = cli("trace --diff", a, b, code=1).out
    for words in (
        "first difference: block 0, step 1, position 3",
        "A  committed  token 13 '\\n', confidence 0.970000",
        "B  left       token 13 '\\n', confidence 0.899900",
        "margin 0.070000 from the threshold 0.9",
    ):
        assert words in out
    facts = cli.json("trace --diff", a, b, code=1)
    found = facts["a"]["bundle"], facts["equal"], facts["position"], facts["margin_of"]
    assert found == ("small", False, 3, "threshold")
