"""Program text is found in plan bytes, and nothing but a whole, known text is read."""

from __future__ import annotations

import random

import pytest

from tests.helpers.errors import fails
from tests.helpers.rtx_program_text import Launch, plan_of, program
from twotower.builders.trt.rtx_program import text
from twotower.builders.trt.rtx_program.read import read_programs
from twotower.builders.trt.rtx_program.text import ProgramTextError

TEXT = program().text()
SECOND = program(
    inputs=["tokens [profile 1].1", "tower.layers.0.mixer.up.weight [profile 1].1"],
    outputs=["y [profile 1].1"],
    tensors=[],
    launches=[Launch("__myl_Move", [], ["rows.1"])],
).text()


@pytest.mark.parametrize("chunk", [5, 64, 1 << 20])
def test_programs_are_found_whatever_pieces_the_plan_is_searched_in(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_CHUNK", chunk)
    assert list(text.program_texts(plan_of(TEXT, SECOND))) == [TEXT, SECOND]
    assert list(text.program_texts(memoryview(plan_of(TEXT)))) == [TEXT]


def test_a_plan_without_a_program_is_not_read() -> None:
    for plan in (b"", b"ptrt" + bytes(1000), plan_of()):
        with fails(ProgramTextError, "not read", found="none"):
            read_programs(plan)


@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_the_mark_among_the_bytes_of_weights_is_no_program(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some gigabytes of packed weights hold such a word by chance."""
    monkeypatch.setattr(text, "_CHUNK", chunk)
    weights = b"NLYM" + bytes(range(256)) + b"NLYMNLYM" + bytes(64)
    plan = weights + plan_of(TEXT, SECOND) + weights
    assert list(text.program_texts(plan)) == [TEXT, SECOND]
    assert len(read_programs(plan, profiles=2)) == 2
    with pytest.raises(ProgramTextError, match="not read"):
        read_programs(weights)


def test_fewer_programs_than_profiles_are_no_figures() -> None:
    assert len(read_programs(plan_of(TEXT, SECOND), profiles=2)) == 2
    for plan, profiles in (
        (plan_of(TEXT), 2),
        (plan_of(SECOND), 1),
        (plan_of(TEXT, TEXT), 2),
        (plan_of(TEXT, SECOND), 1),
    ):
        with pytest.raises(ProgramTextError):
            read_programs(plan, profiles=profiles)


def test_a_plan_cut_off_anywhere_is_refused() -> None:
    plan = plan_of(TEXT, SECOND)
    end = (
        plan.index(b"\xb0", plan.index(SECOND.encode())) - 3
    )  # what follows the last program is not its part
    for cut in range(0, end, 97):
        with pytest.raises(ProgramTextError):
            read_programs(plan[:cut], profiles=2)


@pytest.mark.parametrize("seed", range(40))
def test_a_garbled_plan_is_read_or_refused_and_never_a_crash(seed: int) -> None:
    drawn = random.Random(seed)
    plan = bytearray(plan_of(TEXT, SECOND))
    alphabet = range(256) if seed % 2 else range(32, 127)
    for _ in range(drawn.choice((1, 3, 30))):
        at = drawn.randrange(len(plan))
        plan[at : at + drawn.choice((0, 1, 4))] = bytes(
            drawn.choices(alphabet, k=drawn.choice((0, 1, 4)))
        )
    try:
        programs = read_programs(bytes(plan))
    except ProgramTextError as e:
        assert e.found
        assert e.do
    else:
        assert all(len(p.kernels) <= 3 for p in programs)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("version = 5", "version = 6", "layout is 6"),
        ("version = 5", "release = 5", "not stated"),
        ("memory_budget", "memory_bugdet", "does not begin"),
        ("descriptors {", "descriptors [", "outside of its sections"),
        ("  function={", "  function<", "no statement"),
        (" label bb1: ", " label bb1: \n label bb7: ", "2 labels"),
        ("  fully_", "  branch={ name=b }\n  fully_", "'branch' writes nothing"),
        ('input={ "tokens.1"', 'input={ "other.1"', "not described: 'other.1'"),
        ("stream=0", "stream=1", "more streams than the 1"),
        ('region="scratch_0"', 'region="scratch_7"', "unknown region 'scratch_7'"),
        ("n_streams = 1", "n_streams = many", "'n_streams'"),
        ("size=4096", "size=4k", "no number 'size'"),
        ("y.1", "y.\x00", "no text"),
    ],
)
def test_a_text_of_another_form_says_why_it_is_not_read(old: str, new: str, why: str) -> None:
    check_refused(TEXT.replace(old, new), why)


def test_a_text_that_is_not_whole_says_why_it_is_not_read() -> None:
    check_refused(TEXT.replace("main {", "mian {", 1), "section 'mian'")
    check_refused(TEXT + "}", "goes on")
    check_refused(TEXT[:-3], "breaks off")


def check_refused(damaged: str, why: str) -> None:
    assert damaged != TEXT
    with fails(ProgramTextError, found=(why, "known: layout 5")):
        read_programs(plan_of(damaged))


def test_a_program_without_its_last_kernel_is_a_sound_text() -> None:
    """This is what cannot be seen."""
    rest = TEXT[TEXT.index("shape_main") :].replace("fully", "")
    cut = TEXT[: TEXT.index("  function")] + "}\n" + rest
    assert len(read_programs(plan_of(cut))[0].kernels) == 1
