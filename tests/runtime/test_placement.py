"""Where engines go: a tower on each of two devices, segments in order and evenly over more."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from twotower.bundle import EngineFile
from twotower.runtime.placement import place_engines, places_of_tensors
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, StateTensor, TensorSpec

SIZES = st.lists(st.integers(1, 100), min_size=1, max_size=12)


@given(SIZES, SIZES, st.integers(1, 6))
def test_segments_keep_their_order_and_towers_their_devices(
    context: list[int], denoiser: list[int], count: int
) -> None:
    devices = list(range(10, 10 + count))
    placed = place_engines({CONTEXT: context, CONTEXT_HEAD: [1], DENOISER: denoiser}, devices)
    for name, sizes in ((CONTEXT, context), (DENOISER, denoiser)):
        assert len(placed[name]) == len(sizes)
        assert all(a <= b for a, b in pairwise(placed[name])), "work passes through a device once"
    assert placed[CONTEXT_HEAD] == placed[CONTEXT][-1:]
    if count > 1:
        assert not set(placed[CONTEXT]) & set(placed[DENOISER]), "each tower has devices of its own"


@given(st.integers(1, 4), st.integers(1, 5))
def test_equal_segments_are_spread_evenly(devices: int, each: int) -> None:
    sizes = {CONTEXT: [5] * (devices * each), CONTEXT_HEAD: [1], DENOISER: [5] * (devices * each)}
    placed = place_engines(sizes, range(2 * devices))
    for name in (CONTEXT, DENOISER):
        assert {placed[name].count(d) for d in set(placed[name])} == {each}


def test_a_state_is_written_where_the_context_tower_is_and_needed_where_the_denoiser_is() -> None:
    past, present, block = (
        TensorSpec(name, "float32", ("B",)) for name in ("past", "present", "block")
    )
    engines = {
        CONTEXT: (EngineFile("c", (0, 1), (past,), (present,), ()),),
        CONTEXT_HEAD: (EngineFile("h", (0, 1), (), (), ()),),
        DENOISER: (EngineFile("d", (0, 1), (past, block), (), ()),),
    }
    places = places_of_tensors(
        engines,
        {CONTEXT: (1,), CONTEXT_HEAD: (1,), DENOISER: (0,)},
        [StateTensor(past, present, in_place=True)],
    )
    assert places == {"past": (1, 0), "block": (0,)}
