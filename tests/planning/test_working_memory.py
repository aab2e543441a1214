"""State, scratch and placement: what lies in a device's memory, and how it grows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.errors import fails
from tests.helpers.published import PUBLISHED, of_layers
from twotower.config.model import LayerKind
from twotower.errors import ConfigError
from twotower.planning import PlanOptions
from twotower.planning.devices import device_needs
from twotower.planning.expert_path import expert_path, segments_of
from twotower.planning.pass_cost import pass_costs
from twotower.planning.plan_options import capacity_of
from twotower.planning.scratch import Shapes, scratch
from twotower.planning.working_memory import state_bytes, tower_scratch
from twotower.spec import CONTEXT, DENOISER

OPTIONS = PlanOptions(target="trt")
DENSE = replace(OPTIONS, expert_path="dense")


def test_the_published_state() -> None:
    state = state_bytes(PUBLISHED, OPTIONS)
    assert state.per_token == 6 * 1024
    assert round(state.per_row / 2**20) == 47
    assert state.capacity == capacity_of(PUBLISHED, OPTIONS) == 4352
    assert state.total == 8 * (4352 * 6 * 1024 + 2 * state.per_row)


@given(
    rows=st.integers(1, 64),
    context=st.integers(1, 100_000),
    more_rows=st.integers(0, 64),
    more_context=st.integers(0, 100_000),
    changes=st.fixed_dictionaries(
        {
            "devices": st.integers(1, 5),
            "dtype": st.sampled_from(["float32", "bfloat16"]),
            "mode": st.sampled_from(["diffusion", "ar"]),
            "expert_path": st.sampled_from(["auto", "dense"]),
        }
    ),
)
def test_memory_only_grows_with_rows_and_length(
    rows: int, context: int, more_rows: int, more_context: int, changes: dict[str, Any]
) -> None:
    """Where kernels end (16 rows) engines begin that compute all experts: they take more."""
    small = replace(OPTIONS, max_batch=rows, max_context=context, **changes)
    large = replace(small, max_batch=rows + more_rows, max_context=context + more_context)
    before, after = device_needs(PUBLISHED, small), device_needs(PUBLISHED, large)
    assert len(before) == len(after) == changes["devices"]
    assert max(d.total for d in after) >= max(d.total for d in before)
    if expert_path(PUBLISHED, small) == expert_path(PUBLISHED, large):
        assert all(a.total >= b.total for a, b in zip(after, before, strict=True))
    less, more = (pass_costs(PUBLISHED, options).ar_step.nbytes for options in (small, large))
    assert more >= less


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_devices_hold_all_weights_between_them(devices: int, mode: str) -> None:
    (alone,) = device_needs(PUBLISHED, replace(OPTIONS, mode=mode))
    spread = device_needs(PUBLISHED, replace(OPTIONS, devices=devices, mode=mode))
    assert sum(d.weights for d in spread) == alone.weights
    # Of an odd number the context tower gets the smaller half; a layer of experts and the head or
    # the embedding are 3.3 GB.
    most = alone.weights / (2 * (devices // 2) if mode == "diffusion" else devices)
    assert max(d.weights for d in spread) < most + 3.3e9
    towers = 2 if mode == "diffusion" else 1
    assert sum(d.state for d in spread) == pytest.approx(towers * alone.state, abs=devices)


def test_more_devices_than_towers_take_segments() -> None:
    halves = ("layers 0 to 26", "layers 27 to 51")
    four = device_needs(PUBLISHED, replace(DENSE, devices=4))
    towers = ("context", "denoiser")
    assert [d.holds for d in four] == [f"{tower} {half}" for tower in towers for half in halves]
    two = device_needs(PUBLISHED, replace(OPTIONS, devices=2))
    assert [d.holds for d in two] == ["context tower", "denoiser tower"]
    three = device_needs(PUBLISHED, replace(DENSE, devices=3))
    assert three[0].holds == "context tower"
    assert three[0].weights > 63e9 > three[1].weights
    segments = [segments_of(PUBLISHED, replace(DENSE, devices=n)) for n in range(1, 6)]
    assert segments == [1, 1, 2, 2, 3]
    assert segments_of(PUBLISHED, replace(DENSE, devices=4, mode="ar")) == 4


def test_programs_between_experts_are_spread_without_segments() -> None:
    """As the runtime spreads them: experts are where the program before them is."""
    four = device_needs(PUBLISHED, replace(OPTIONS, devices=4))
    places = [d.holds.split() for d in four]  # "context layers 0 to 25"
    starts, ends = ([int(words[i]) for words in places] for i in (2, 4))
    assert (starts[0], ends[1], starts[2], ends[3]) == (0, 51, 0, 51)
    for i in (0, 2):
        assert starts[i + 1] == ends[i] + 1
        assert PUBLISHED.layers[ends[i]] is LayerKind.MOE
    assert segments_of(PUBLISHED, replace(OPTIONS, devices=4)) == 1


def test_onnx_runtime_runs_towers_whole() -> None:
    spread = device_needs(PUBLISHED, replace(OPTIONS, target="ort-cuda", devices=4))
    assert [d.holds for d in spread] == ["", "context tower", "", "denoiser tower"]
    assert segments_of(PUBLISHED, replace(OPTIONS, target="ort-cuda", devices=4)) == 1


SHAPES = Shapes("bfloat16", 8, 4352, 16)


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_share_the_memory_of_their_tensors(graph: str, dtype: str) -> None:
    def needs(letters: str) -> int:
        return scratch(graph, of_layers(letters), replace(SHAPES, dtype=dtype)).nbytes

    alone = [needs("*"), needs("M*"), needs("E*")]
    assert max(alone) <= needs("ME*") < sum(alone)
    modulation = 3 * 8 * 3 * 2688 * (4 if dtype == "float32" else 2) if graph == DENOISER else 0
    assert needs("ME*ME*") == needs("ME*") + modulation, "more layers of a kind take no more"


def test_engines_for_one_row_are_compiled_for_two() -> None:
    def planned(target: str, rows: int) -> int:
        options = replace(OPTIONS, target=target, max_batch=rows)
        return tower_scratch(PUBLISHED, options)[DENOISER].nbytes

    for target in ("rtx", "trt"):
        assert planned(target, 1) == planned(target, 2) < planned(target, 3)
    assert planned("ort-cpu", 1) < planned("ort-cpu", 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": "tpu"}, "ort-cuda"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"experts": "int3"}, "nvfp4"),
        ({"expert_path": "chosen"}, "kernels"),
        ({"mode": "both"}, "diffusion"),
        ({"devices": 0}, "1 and more"),
        ({"disk_rate": 0}, "1 byte a second"),
        ({"max_batch": 0}, "1 and more"),
    ],
)
def test_an_unusable_option_names_what_is_allowed(changes: dict[str, object], says: str) -> None:
    with fails(ConfigError, found=says):
        PlanOptions(**changes)  # type: ignore[arg-type]
