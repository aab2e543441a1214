"""Launches: grids for every routing, scratch memory without overlaps, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import make_shape, routing
from tests.helpers.fake_kernels import write_kernels
from twotower.errors import EngineMismatchError, RequestError, TwoTowerError
from twotower.kernels import launches, scratch_bytes, weight_names
from twotower.kernels.launches import most_blocks
from twotower.kernels.tilings import TIERS, tier_for

PUBLISHED = make_shape(2688, 1856, 128, 6, shared=3712, dtype="bfloat16", routed="int4-32")


@settings(max_examples=200, deadline=None)
@given(
    experts=st.integers(1, 40),
    top=st.integers(1, 8),
    tokens=st.integers(1, 200),
    rows=st.sampled_from((16, 32, 64)),
    kind=st.sampled_from(("uniform", "one", "few", "skewed")),
    seed=st.integers(0, 99),
)
def test_no_routing_needs_more_blocks_than_the_grid_has(
    experts: int, top: int, tokens: int, rows: int, kind: str, seed: int
) -> None:
    shape = make_shape(16, 16, experts, min(top, experts))
    counts = (routing(shape, tokens, kind, seed) != 0).sum(1)
    assert (-(-counts // rows)).sum() <= most_blocks(shape, tokens, rows)


def test_blocks_are_not_many_more_than_needed() -> None:
    needed = {(1, 16): 6, (16, 16): 96, (64, 16): 144, (4096, 64): 510}
    assert {(n, rows): most_blocks(PUBLISHED, n, rows) for n, rows in needed} == needed


@pytest.mark.parametrize("tokens", (1, 8, 9, 64, 65, 512, 513, 4096))
def test_a_layer_is_four_launches_for_few_tokens_and_five_for_many(
    tmp_path: Path, tokens: int
) -> None:
    table = write_kernels(tmp_path / "k", PUBLISHED, (90,))
    made = launches(PUBLISHED, tokens, 90, table)
    tier = tier_for(tokens).name
    pairs = [f"pairs-{tier}"] if tokens <= 64 else [f"slots-{tier}", f"order-{tier}"]
    assert [launch.kernel for launch in made] == [*pairs, f"up-{tier}", f"down-{tier}", "combine"]
    for launch in made:
        cubin = table.cubin(launch.kernel, 90)
        assert (launch.block, launch.shared_bytes) == (cubin.threads, cubin.shared)
        assert len(launch.params) == len(cubin.arguments)
        assert launch.grid[1] <= 65535


def test_parameters_name_arrays_and_places_in_scratch_memory(tmp_path: Path) -> None:
    table = write_kernels(tmp_path / "k", PUBLISHED, (90,))
    pairs, up, down, combine = launches(PUBLISHED, 16, 90, table)
    assert pairs.params[0] == "shares"
    assert pairs.params[-2:] == (16, 96)
    assert up.params[:7] == ("x", "up", "up_scale", 0, "shared_up", 0, 0)
    assert down.params[1:7] == ("down", "down_scale", 0, "shared_down", 0, 0)
    assert up.params[-3] == down.params[0], "what up writes down reads"
    assert (combine.params[0], combine.params[2]) == (down.params[-3], "out")
    names = "up up_scale down down_scale shared_up shared_down"
    assert weight_names(PUBLISHED) == tuple(names.split())


@pytest.mark.parametrize("tokens", (1, 16, 64, 300, 4096))
def test_intermediate_arrays_lie_apart(tmp_path: Path, tokens: int) -> None:
    from twotower.kernels.launches import _places

    s = PUBLISHED
    places = _places(s, tokens)
    end = places.pop("end")
    assert end == scratch_bytes(s, tokens)
    starts = sorted(places.values())
    sizes = np.diff([*starts, end])
    needed = {
        "order": 4 * tokens * s.top,
        "share_of": 4 * tokens * s.top,
        "blocks": 12 * most_blocks(s, tokens, tier_for(tokens).rows),
        "h": 2 * tokens * (s.top * s.width + s.shared_intermediate),
        "y": 2 * tokens * (s.top + 2) * s.hidden,
        "slots": s.experts * tokens,
        "counts": 4 * s.experts * -(-tokens // 16),
    }
    for name, start in places.items():
        assert start % 256 == 0
        assert sizes[starts.index(start)] >= needed[name]


@pytest.mark.parametrize(
    ("tokens", "sm", "error", "says"),
    [
        (TIERS[-1].tokens + 1, 90, RequestError, "4097 tokens"),
        (16, 89, EngineMismatchError, "(?s)SM 89.*80, 90"),
    ],
)
def test_what_no_kernel_was_compiled_for_is_refused(
    tmp_path: Path, tokens: int, sm: int, error: type[TwoTowerError], says: str
) -> None:
    table = write_kernels(tmp_path / "k", PUBLISHED, (80, 90))
    with pytest.raises(error, match=says) as e:
        launches(PUBLISHED, tokens, sm, table)
    check_error(str(e.value), e.value.what)
