"""The cut of a tower under a memory bound: as few pieces as can be, none too large."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.builders.cut import build_memory, cut_layers, even_layers, most_weights
from twotower.errors import BuildError


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 30), st.integers(0, 30), st.integers(80, 300))
def test_pieces_cover_the_tower_and_no_two_neighbours_would_fit_together(sizes: list[int], before: int, after: int, most: int) -> None:
    if len(sizes) == 1 and sizes[0] + before + after > most:
        return
    groups = cut_layers(sizes, first_extra=before, last_extra=after, most=most)
    assert groups[0][0] == 0
    assert groups[-1][1] == len(sizes)
    assert all(a[1] == b[0] for a, b in pairwise(groups))
    whole = list(sizes)
    whole[0] += before
    whole[-1] += after
    loads = [sum(whole[a:b]) for a, b in groups]
    assert max(loads) <= most
    assert all(sum(whole[a[0] : b[0] + 1]) > most for a, b in pairwise(groups)), "greedy: the next layer did not fit"


def test_a_layer_that_is_too_large_is_named_with_the_bound_it_needs() -> None:
    with pytest.raises(BuildError) as error:
        cut_layers([10**9, 3 * 10**9, 10**9], first_extra=0, last_extra=0, most=2 * 10**9)
    assert "layer 1" in error.value.what
    assert "10G" in error.value.do


def test_the_bound_and_its_inverse_agree() -> None:
    assert most_weights(build_memory(10**9)) == pytest.approx(10**9, rel=1e-6)
    assert most_weights(1) == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 6))
def test_even_groups_cover_the_tower_and_none_is_larger_than_a_share_and_a_layer(sizes: list[int], count: int) -> None:
    groups = even_layers(sizes, count)
    assert len(groups) <= count
    assert (groups[0][0], groups[-1][1]) == (0, len(sizes))
    assert all(a[1] == b[0] for a, b in pairwise(groups))
    assert all(sum(sizes[a:b]) <= sum(sizes) / count + max(sizes) for a, b in groups)
