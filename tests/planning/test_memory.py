"""State, scratch and placement: what lies in a device's memory, and how it grows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.config.model import parse_model_config
from twotower.errors import ConfigError
from twotower.export.synthetic import PUBLISHED_CONFIG, published_slice
from twotower.planning import PlanOptions
from twotower.planning.memory import device_needs, state_bytes, traffic
from twotower.planning.options import capacity_of
from twotower.planning.scratch import Shapes, scratch
from twotower.spec import CONTEXT, DENOISER

PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
OPTIONS = PlanOptions(target="trt")


def test_the_published_state() -> None:
    state = state_bytes(PUBLISHED, OPTIONS)
    assert state.per_token == 6 * 1024
    assert round(state.per_row / 2**20) == 47
    assert state.capacity == capacity_of(PUBLISHED, OPTIONS) == 4352
    assert state.total == 8 * (4352 * 6 * 1024 + 2 * state.per_row)


@given(
    rows=st.integers(1, 64), context=st.integers(1, 100_000), more_rows=st.integers(0, 64), more_context=st.integers(0, 100_000),
    devices=st.integers(1, 5), dtype=st.sampled_from(["float32", "bfloat16"]), mode=st.sampled_from(["diffusion", "ar"]),
)  # fmt: skip
def test_memory_only_grows_with_rows_and_length(
    *, rows: int, context: int, more_rows: int, more_context: int, devices: int, dtype: str, mode: str
) -> None:
    small = replace(OPTIONS, max_batch=rows, max_context=context, devices=devices, dtype=dtype, mode=mode)
    large = replace(small, max_batch=rows + more_rows, max_context=context + more_context)
    before, after = device_needs(PUBLISHED, small), device_needs(PUBLISHED, large)
    assert len(before) == len(after) == devices
    assert all(a.total >= b.total for a, b in zip(after, before, strict=True))
    assert traffic(PUBLISHED, large).ar_step >= traffic(PUBLISHED, small).ar_step


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_devices_hold_all_weights_between_them(devices: int) -> None:
    (alone,) = device_needs(PUBLISHED, OPTIONS)
    spread = device_needs(PUBLISHED, replace(OPTIONS, devices=devices))
    assert sum(d.weights for d in spread) >= alone.weights
    assert max(d.weights for d in spread) < alone.weights


def test_two_devices_hold_a_tower_each() -> None:
    (alone,) = device_needs(PUBLISHED, OPTIONS)
    reader, writer = device_needs(PUBLISHED, replace(OPTIONS, devices=2))
    assert reader.weights + writer.weights == alone.weights
    assert (reader.holds, writer.holds) == ("context tower", "denoiser tower")


def test_the_largest_tensors_are_those_the_graph_writes_out() -> None:
    shapes = Shapes("bfloat16", 8, 4352, 16)
    experts = scratch(CONTEXT, PUBLISHED, shapes)
    assert experts.because.startswith("experts")
    assert experts.nbytes >= 2 * 4 * 128 * 8 * 256 * 2688, "the products of all experts, in float32, before and after the routing"
    only = {letter: parse_model_config(published_slice(letter), letter) for letter in "M*"}
    assert scratch(CONTEXT, only["M"], shapes).because.startswith("decay")
    assert scratch(DENOISER, only["*"], replace(shapes, max_batch=1)).because.startswith("scores")
    assert scratch(CONTEXT, only["*"], replace(shapes, dtype="float32")).nbytes > 2 * 4 * 8 * 32 * 256 * 4352


def test_a_pass_reads_all_weights_but_the_embedding() -> None:
    single = replace(OPTIONS, max_batch=1, max_context=1)
    moved = traffic(PUBLISHED, single)
    (alone,) = device_needs(PUBLISHED, single)
    embeddings = 2 * 2 * 131072 * 2688
    state = state_bytes(PUBLISHED, single)
    assert moved.denoiser_pass + moved.ar_step == alone.weights - embeddings + 2 * state.read + state.per_row + state.per_token
    assert traffic(PUBLISHED, replace(single, mode="ar")).denoiser_pass == 0


def test_expanded_experts_are_read_written_and_read_again() -> None:
    """As a bundle of the recipe `int8-weights` holds them, and of `int8`, whose products read 8 bits on both sides."""
    single = replace(OPTIONS, target="rtx", max_batch=1, max_context=1)
    experts = 128 * 2 * 1856 * 2688 * 23
    floats = traffic(PUBLISHED, single)
    stored = experts + 2 * experts // 64  # a bfloat16 scale for 64
    weights = replace(single, formats=(("routed_expert", "int8"),))
    moved = traffic(PUBLISHED, weights)
    assert moved.expanded == 4 * experts
    assert moved.denoiser_pass == floats.denoiser_pass - 2 * experts + stored + 4 * experts
    assert moved.ar_step == floats.ar_step - 2 * experts + stored + 4 * experts
    assert traffic(PUBLISHED, replace(weights, mode="ar")).expanded == 4 * experts
    fused = traffic(PUBLISHED, replace(weights, rounded=("routed_expert",)))
    rows = 2 * 128 * (1856 + 2688) * 23  # a bfloat16 scale a row
    assert fused.expanded == 0
    assert fused.denoiser_pass == floats.denoiser_pass - 2 * experts + experts + rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "tpu"}, "ort-cuda"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"experts": "int3"}, "nvfp4"),
        ({"mode": "both"}, "diffusion"),
        ({"devices": 0}, "1 and more"),
        ({"max_batch": 0}, "1 and more"),
    ],
)
def test_an_unusable_option_names_what_is_allowed(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PlanOptions(**changes)  # type: ignore[arg-type]
    assert says in caught.value.found
