"""The cut of a tower: even for several devices, or under a memory bound with as few pieces as can be, none too large."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers.errors import fails
from twotower.builders.build_cost import LayerBytes, build_memory
from twotower.builders.trt.cut import cut_layers, even_layers, least_bound, tower_cuts
from twotower.errors import BuildError

GB = 10**9
SIZES = st.lists(st.integers(0, 5 * GB), min_size=1, max_size=12)
END = st.integers(0, 3 * GB)


def needed(held: LayerBytes, first: int, end: int) -> int:
    return build_memory(held.between(first, end), end - first, largest_packed=held.largest_packed)


@given(SIZES, END, END, st.integers(0, GB), st.integers(GB, 40 * GB))
def test_pieces_cover_the_tower_and_no_two_neighbours_would_fit_together(
    sizes: list[int], before: int, after: int, packed: int, bound: int
) -> None:
    held = LayerBytes(tuple(sizes), before, after, packed)
    assume(least_bound(held) <= bound)
    groups = cut_layers(held, bound)
    assert groups[0][0] == 0
    assert groups[-1][1] == len(sizes)
    assert all(a[1] == b[0] for a, b in pairwise(groups))
    assert max(needed(held, *group) for group in groups) <= bound
    assert all(needed(held, a[0], b[0] + 1) > bound for a, b in pairwise(groups)), (
        "greedy: the next layer did not fit"
    )


@given(SIZES, END, END, st.integers(0, GB), st.data())
def test_a_piece_is_as_long_as_it_may_be_to_the_byte(
    sizes: list[int], before: int, after: int, packed: int, data: st.DataObject
) -> None:
    held = LayerBytes(tuple(sizes), before, after, packed)
    whole = range(len(sizes))
    bounds = {needed(held, a, b + 1) for a in whole for b in whole[a:]}
    bound = data.draw(st.sampled_from(sorted(b for b in bounds if b >= least_bound(held))))
    groups, start = [], 0
    for end in whole[2:]:
        if needed(held, start, end) > bound:
            groups.append((start, end - 1))
            start = end - 1
    if len(sizes) - start > 1 and needed(held, start, len(sizes)) > bound:
        groups.append((start, len(sizes) - 1))
        start = len(sizes) - 1
    assert cut_layers(held, bound) == (*groups, (start, len(sizes)))


def test_a_graph_without_layers_needs_memory_for_all_of_it() -> None:
    assert least_bound(LayerBytes((), GB, GB)) == build_memory(2 * GB, 0)


@given(SIZES, END, END, st.integers(0, GB))
def test_the_least_bound_is_the_least(
    sizes: list[int], before: int, after: int, packed: int
) -> None:
    held = LayerBytes(tuple(sizes), before, after, packed)
    assert cut_layers(held, least_bound(held))
    with pytest.raises(BuildError):
        cut_layers(held, least_bound(held) - 1)


def test_a_layer_that_is_too_large_is_named_with_the_bound_it_needs() -> None:
    with pytest.raises(BuildError) as error:
        cut_layers(LayerBytes((GB, 3 * GB, GB), 0, 0), 6 * GB)
    assert error.value.what.startswith("layer 1 cannot")
    assert "10G" in error.value.do


@pytest.mark.parametrize(
    ("sizes", "what"),
    [((3, 1, 1), "layer 0 with the embedding"), ((1, 1, 3), "layer 2 with the head")],
)
def test_a_layer_at_an_end_is_too_large_with_what_is_beside_it(
    sizes: tuple[int, ...], what: str
) -> None:
    with pytest.raises(BuildError, match=what):
        cut_layers(LayerBytes(tuple(n * GB for n in sizes), 0, 0), 6 * GB)


def test_a_layer_goes_where_its_middle_lies() -> None:
    assert even_layers([5, 2, 5], 2) == ((0, 1), (1, 3))
    assert even_layers([5, 1, 6], 2) == ((0, 2), (2, 3))
    assert even_layers([4, 4, 0], 2) == ((0, 1), (1, 3)), "there are no more groups than devices"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 6))
def test_even_groups_cover_the_tower_and_none_is_larger_than_a_share_and_a_layer(
    sizes: list[int], count: int
) -> None:
    groups = even_layers(sizes, count)
    assert len(groups) <= count
    assert (groups[0][0], groups[-1][1]) == (0, len(sizes))
    assert all(a[1] == b[0] for a, b in pairwise(groups))
    assert all(sum(sizes[a:b]) <= sum(sizes) / count + max(sizes) for a, b in groups)


def test_a_tower_is_one_engine_unless_it_is_cut() -> None:
    none, some = LayerBytes((0,) * 4, 0, 0), LayerBytes((GB,) * 4, 0, 0)
    weights = (GB,) * 4
    assert tower_cuts((), LayerBytes((), 0, GB)) == ((0, 0),)
    assert tower_cuts(weights, some) == ((0, 4),)
    assert tower_cuts(weights, none, bound=2 * GB) == ((0, 4),), (
        "weights that are inputs cost no memory"
    )
    assert len(tower_cuts(weights, some, bound=4 * GB)) == 4
    assert tower_cuts(weights, some, segments=2) == ((0, 2), (2, 4))
    assert tower_cuts(weights, none, segments=2, bound=2 * GB) == ((0, 2), (2, 4))
    enough = needed(some, 2, 4)
    assert tower_cuts(weights, some, segments=2, bound=enough) == ((0, 2), (2, 4))
    with pytest.raises(BuildError, match="layers 0 to 1 cannot be built"):
        tower_cuts(weights, some, segments=2, bound=enough - 1)
    with fails(BuildError, "layers 0 to 1 cannot be built", do="--segments"):
        tower_cuts(weights, some, segments=2, bound=4 * GB)
