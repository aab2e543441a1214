"""Shapes that engines are tuned for, in numbers."""

from __future__ import annotations

import pytest

from twotower.builders.profiles import cache_capacity, greatest_rows, profiles
from twotower.errors import ConfigError
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER


def test_a_cache_holds_a_chunk_more_in_whole_lines() -> None:
    assert [cache_capacity(n, 4096) for n in (1, 64, 65, 4096)] == [320, 320, 384, 4352]
    with pytest.raises(ConfigError, match="--max-context 4097 is longer") as caught:
        cache_capacity(4097, 4096)
    assert caught.value.found == "1 to 4096 tokens are allowed"


def test_the_context_is_tuned_for_its_three_uses_and_two_rows_at_least() -> None:
    for most, rows in ((1, (1, 1, 2)), (2, (1, 2, 2)), (8, (1, 8, 8))):
        assert greatest_rows(most) == rows[2]
        made = {p.name: dict(p.axes) for p in profiles(CONTEXT, max_batch=most, block_size=16)}
        lengths = {"prefill": (1, 256, 256), "block": (16, 16, 16), "decode": (1, 1, 1)}
        assert made == {name: {"B": rows, "L": length} for name, length in lengths.items()}
        for graph, name in ((CONTEXT_HEAD, "head"), (DENOISER, "denoise")):
            (one,) = profiles(graph, max_batch=most, block_size=16)
            assert (one.name, dict(one.axes)) == (name, {"B": rows})


@pytest.mark.parametrize(("longest", "capacity"), [(2048, 2304), (131072, 4352)])
def test_a_length_that_is_not_given_is_4096_or_the_models_limit(
    longest: int, capacity: int
) -> None:
    assert cache_capacity(None, longest) == capacity
