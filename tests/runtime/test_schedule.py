"""Blocks, prefill plans and capacities: whole numbers, checked over many."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.runtime.schedule import (
    CHUNK_WIDTHS,
    block_count,
    capacity_bucket,
    capacity_limit,
    commit_floor,
    prefill_plan,
    row_counts,
)

lengths = st.lists(st.integers(1, 700), min_size=1, max_size=8)


@given(st.integers(0, 64), st.integers(1, 32))
def test_the_floor_alone_empties_a_block_in_its_steps(masked: int, steps: int) -> None:
    left = masked
    for step in range(steps):
        floor = commit_floor(left, step, steps)
        assert 0 <= floor <= left
        assert floor * (steps - step) >= left  # spread evenly over what is left
        assert (floor == 0) == (left == 0)
        left -= floor
    assert left == 0


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_blocks_hold_all_tokens_and_none_is_empty(tokens: int, size: int) -> None:
    blocks = block_count(tokens, size)
    assert (blocks - 1) * size < tokens <= blocks * size


def test_widths_of_chunks_double_up_to_the_longest_chunk() -> None:
    assert tuple(2**n for n in range(9)) == CHUNK_WIDTHS


@pytest.mark.parametrize(
    ("most", "counts"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (32, (1, 2, 4, 8, 16, 32))],
)
def test_numbers_of_rows(most: int, counts: tuple[int, ...]) -> None:
    assert row_counts(most) == counts


@pytest.mark.parametrize(
    ("masked", "step", "steps", "floor"),
    [(16, 0, 16, 1), (16, 0, 5, 4), (7, 3, 4, 7), (7, 9, 4, 7), (5, 0, 2, 3)],
)
def test_known_floors(masked: int, step: int, steps: int, floor: int) -> None:
    assert commit_floor(masked, step, steps) == floor


@given(lengths, st.integers(1, 256))
def test_a_plan_reads_every_token_once_in_order_and_its_peak_is_exact(
    prompts: list[int], max_chunk: int
) -> None:
    plan = prefill_plan(prompts, max_chunk)
    read = [0] * len(prompts)
    highest = 0
    for step in plan.steps:
        assert step.width == max(step.lengths) <= max_chunk
        for i, (start, length) in enumerate(zip(step.starts, step.lengths, strict=True)):
            assert start == read[i]
            read[i] += length
            highest = max(highest, start + step.width)
    assert read == prompts
    assert plan.peak == highest
    assert all(plan.steps[-1].lengths), "the last pass leaves every row's last hidden vector"


@given(lengths, st.integers(1, 256))
def test_a_row_is_cut_the_same_way_whoever_is_beside_it(prompts: list[int], max_chunk: int) -> None:
    together = prefill_plan(prompts, max_chunk)
    for i, n in enumerate(prompts):
        mine = [(s.starts[i], s.lengths[i]) for s in together.steps if s.lengths[i]]
        assert mine == [(s.starts[0], s.lengths[0]) for s in prefill_plan([n], max_chunk).steps]
        assert all(s.starts[i] == 0 for s in together.steps if not s.lengths[i]), (
            "a row without tokens needs no room"
        )


@given(lengths, st.integers(1, 256))
def test_the_limit_holds_every_plan(prompts: list[int], max_chunk: int) -> None:
    plan = prefill_plan(prompts, max_chunk)
    limit = capacity_limit(max(prompts), max_chunk)
    assert plan.peak <= capacity_bucket(plan.peak, limit) <= limit


def test_buckets_double_up_to_the_limit() -> None:
    buckets = {1: 256, 256: 256, 257: 512, 512: 512, 513: 1000, 1000: 1000}
    assert {n: capacity_bucket(n, 1000) for n in buckets} == buckets
    assert capacity_bucket(10, 100) == 100


@given(lengths)
def test_chunks_are_padded_to_the_next_width_of_a_device(prompts: list[int]) -> None:
    plain, padded = prefill_plan(prompts), prefill_plan(prompts, widths=CHUNK_WIDTHS)
    for ours, step in zip(plain.steps, padded.steps, strict=True):
        assert (step.starts, step.lengths) == (ours.starts, ours.lengths)
        assert step.width == 1 << (ours.width - 1).bit_length(), "the next power of two"
    assert padded.peak == max(start + step.width for step in padded.steps for start in step.starts)
