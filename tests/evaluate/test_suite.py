"""Suites: what a line may be, how the shipped one is made up, and what counts as right."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_model import problem
from twotower.errors import SuiteError
from twotower.evaluate.suite import Problem, Suite, is_degenerate, judge, load_suite

LINE = json.dumps({"kind": "a", "prompt": "p", "answer": "q"})


def test_the_shipped_suite_is_large_varied_and_without_repetition() -> None:
    suite = load_suite()
    assert len(suite.problems) >= 600
    assert len(suite.kinds) >= 6
    assert len({p.prompt for p in suite.problems}) == len(suite.problems)
    assert len({p.id for p in suite.problems}) == len(suite.problems)
    lengths = collections.Counter((p.kind, p.length) for p in suite.problems)
    assert sum(n for (_, length), n in lengths.items() if length == "out") >= 20
    assert all(
        p.prompt.startswith("Q: ") and p.prompt.endswith("\nA:") and p.answer == p.answer.strip()
        for p in suite.problems
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is not a problem"),
        ('{"prompt": "p", "answer": "q"}', "kind: missing"),
        ('{"kind": "a", "prompt": "p", "answer": ""}', "answer is empty"),
        ('{"kind": "a", "prompt": 5, "answer": "q"}', "prompt: 5"),
        ('{"kind": "a", "prompt": "p", "answer": "q", "hint": "r"}', "hint: unknown"),
        ('{"kind": "a", "prompt": "p", "answer": "q", "match": "fuzzy"}', "match: 'fuzzy'"),
        ('{"kind": "a", "prompt": "p", "answer": "q", "length": "long"}', "length: 'long'"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str, what: str) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(f"{LINE}\n\n{line}\n")
    with pytest.raises(SuiteError) as caught:
        load_suite(file)
    assert "line 3" in caught.value.what
    assert what in str(caught.value)
    assert "write one" in caught.value.do


NAMED = LINE.replace("{", '{"id": "x", ')


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "no problems"),
        (b"\xff\xfe", "cannot read"),
        (f"{NAMED}\n{NAMED}".encode(), "twice"),
        (None, "cannot read"),
    ],
)
def test_files_without_problems_or_with_one_twice_are_refused(
    tmp_path: Path, data: bytes | None, what: str
) -> None:
    file = tmp_path / "s.jsonl"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(SuiteError, match=what):
        load_suite(file)


def test_problems_without_a_name_are_numbered(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(f"{LINE}\n\n{LINE}\n")
    assert [p.id for p in load_suite(file).problems] == ["1", "3"]


def test_part_of_a_suite_is_spread_over_it_and_halves_share_nothing() -> None:
    suite = Suite("s", "0", tuple(problem(k, i) for k in "ab" for i in range(10)))
    part = suite.only(kinds=("b",), limit=2)
    assert [p.id for p in part.problems] == ["b-0", "b-5"]
    first, second = suite.halves()
    assert {p.id for p in first.problems}.isdisjoint(p.id for p in second.problems)
    assert len(first.problems) == len(second.problems) == 10
    assert first.kinds == second.kinds == ("a", "b")
    for wrong in ({"kinds": ("c",)}, {"limit": 0}):
        with pytest.raises(SuiteError):
            suite.only(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SuiteError, match="cannot be halved"):
        suite.only(kinds=("b",), limit=1).halves()


def test_right_is_the_answer_and_nothing_else() -> None:
    exact = Problem("1", "a", "p", "red blue")
    assert judge(exact, " red blue\n", [1, 2]).right
    assert not judge(exact, "red blue red", [1, 2, 1]).right
    loose = Problem("1", "a", "p", "red blue", match="contains")
    assert judge(loose, "well, red blue it is", [5, 1, 2, 6]).right
    looping = judge(loose, "red blue" + " red blue" * 20, [1, 2] * 21)
    assert (looping.right, looping.degenerate) == (False, True)


def test_an_answer_that_repeats_itself_is_no_loop_if_it_is_right() -> None:
    asked = Problem("1", "a", "p", " ".join(["cat"] * 30))
    verdict = judge(asked, asked.answer, [7] * 30)
    assert (verdict.right, verdict.degenerate) == (True, False)


@given(
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.integers(0, 9), min_size=1, max_size=16),
    st.integers(4, 9),
)
def test_every_loop_is_found_after_any_beginning(
    start: list[int], loop: list[int], times: int
) -> None:
    text = start + loop * max(times, -(-16 // len(loop)))
    assert is_degenerate(text)


@given(st.lists(st.integers(), unique=True, max_size=60))
def test_what_never_repeats_is_no_loop(tokens: list[int]) -> None:
    assert not is_degenerate(tokens)
