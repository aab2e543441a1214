"""The kernels in Triton's interpreter: against float64, the NumPy twin and the torch towers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.expert_layers import (
    FORMAT_NAMES,
    ROUTINGS,
    Layer,
    exact,
    make_shape,
    random_layer,
    routing,
    tokens,
)
from tests.helpers.fake_kernels import write_kernels
from tests.helpers.graphs import FIXTURES
from tests.helpers.interpreted import run_interpreted
from twotower.config import read_model_config
from twotower.dtypes import to_float32, to_stored
from twotower.kernels import ExpertShape, experts_twin
from twotower.kernels.twin import Array
from twotower.model.layers import MoE

pytestmark = pytest.mark.kernels

TO_FLOAT64 = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 8e-3}
"""Relative to the norm. In float32 only the order of sums differs. In half widths tokens, weights,
the hidden row, each expert's row and the sum are rounded: half a unit in the last place each."""

TO_TWIN = {"float32": 2e-6, "float16": 4e-4, "bfloat16": 1.5e-3}
"""The twin rounds in the same places: now and then a sum falls to the other side of a tie. In
float16 that is once 2.8e-4 in 150 layers of one token, where 32 of 128 results differ and both are
as far from float64 (4.3e-4); in bfloat16 1.2e-4."""


def apart(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def computed(layer: Layer, x: Array, shares: Array) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        return run_interpreted(
            write_kernels(Path(folder) / "k", layer.shape, (80,)), x, shares, layer.stored
        )


def check(shape: ExpertShape, count: int, kind: str = "uniform", seed: int = 0) -> None:
    """A random layer of this shape on so many tokens, routed in this way."""
    layer, dtype = random_layer(shape, seed), shape.dtype
    x, shares = tokens(shape, count, seed + 1), routing(shape, count, kind, seed + 2)
    got = to_float32(computed(layer, x, shares), dtype)
    assert apart(got, exact(layer, x, shares)) < TO_FLOAT64[dtype]
    twin = to_float32(experts_twin(shape, x, shares, layer.stored), dtype)
    assert apart(got, twin) < TO_TWIN[dtype]


@pytest.mark.parametrize("routed", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", TO_FLOAT64)
def test_every_format(dtype: str, routed: str) -> None:
    shape = make_shape(128, 256, 8, 3, shared=256, dtype=dtype, routed=routed, others=routed)
    check(shape, 7)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    dtype=st.sampled_from(list(TO_FLOAT64)),
    formats=st.tuples(*[st.sampled_from([*FORMAT_NAMES])] * 2),
    count=st.sampled_from((1, 2, 8, 9, 16, 17, 64, 65, 130)),
    kind=st.sampled_from(ROUTINGS),
    experts=st.sampled_from((8, 9, 17)),
    top=st.integers(1, 8),
    shared=st.sampled_from((0, 128, 256, 384)),
    seed=st.integers(0, 1000),
)
def test_combinations(
    dtype: str,
    formats: tuple[str, str],
    count: int,
    kind: str,
    experts: int,
    top: int,
    shared: int,
    seed: int,
) -> None:
    shape = make_shape(
        128, 256, experts, top, shared=shared, dtype=dtype, routed=formats[0], others=formats[1]
    )
    check(shape, count, kind, seed)


@pytest.mark.parametrize(
    ("hidden", "width", "shared"), [(33, 47, 94), (100, 70, 0), (129, 65, 65), (16, 300, 100)]
)
@pytest.mark.parametrize("routed", ("float", "int8", "fp8"))
def test_widths_no_tile_divides(hidden: int, width: int, shared: int, routed: str) -> None:
    check(make_shape(hidden, width, 5, 2, shared=shared, routed=routed, others="float"), 19)


@pytest.mark.parametrize("top", range(1, 9))
def test_every_number_of_choices(top: int) -> None:
    check(make_shape(32, 16, 12, top, shared=32), 12)


@pytest.mark.parametrize(
    ("routed", "kind"), [("float", "skewed"), ("int4-32", "uniform"), ("nvfp4", "one")]
)
def test_600_tokens(routed: str, kind: str) -> None:
    sizes = {"shared": 128, "dtype": "float16", "routed": routed, "others": "float"}
    check(make_shape(64, 128, 16, 4, **sizes), 600, kind)


@pytest.mark.parametrize("experts", (1, 300, 600))
def test_one_expert_and_very_many(experts: int) -> None:
    for count in (3, 40):
        check(make_shape(16, 16, experts, min(experts, 5)), count)


@pytest.mark.parametrize("routed", ("float", "int8", "int4-32", "nvfp4"))
@pytest.mark.parametrize("dtype", TO_FLOAT64)
def test_a_row_does_not_depend_on_its_batch(dtype: str, routed: str) -> None:
    """To the bit: alone, in other orders, and beside rows of infinity and NaN."""
    shape = make_shape(128, 128, 8, 3, shared=128, dtype=dtype, routed=routed, others="float")
    layer = random_layer(shape)
    x, shares = tokens(shape, 41), routing(shape, 41, "skewed")
    whole = computed(layer, x, shares).tobytes()
    back = np.ascontiguousarray(computed(layer, x[::-1].copy(), shares[:, ::-1].copy())[::-1])
    assert back.tobytes() == whole
    row = len(whole) // 41
    for first, count in ((0, 1), (5, 3), (17, 16), (40, 1)):
        some = slice(first, first + count)
        part = computed(layer, x[some].copy(), shares[:, some].copy())
        assert part.tobytes() == whole[first * row : (first + count) * row]
    spoilt = to_float32(x, dtype).copy()
    spoilt[3], spoilt[20] = np.nan, np.inf
    shares[:, 3] = np.nan  # as the graph computes it: every expert
    with np.errstate(all="ignore"):
        got = computed(layer, to_stored(spoilt, dtype), shares)
    others = [n for n in range(41) if n not in (3, 20)]
    assert got[others].tobytes() == np.frombuffer(whole, x.dtype).reshape(41, -1)[others].tobytes()
    assert np.isnan(to_float32(got[3], dtype)).all()


def test_the_torch_towers_compute_the_same() -> None:
    config = read_model_config(FIXTURES / "hybrid-a" / "config.json")
    torch.manual_seed(0)
    moe = MoE(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(parameter.shape[-1], 2) ** 0.5)
    x = torch.randn(1, 21, config.hidden_size)
    with torch.no_grad():
        want = moe(x)[0].numpy()
        share, chosen = moe.route(x[0])
    shape = make_shape(
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        shared=config.shared_intermediate,
    )
    shares = np.zeros((shape.experts, 21), np.float32)
    np.put_along_axis(shares, chosen.numpy().T, share.numpy().T, 0)
    assert moe.shared_experts is not None
    weights = {
        "up": torch.stack([e.up_proj.weight for e in moe.experts]),
        "down": torch.stack([e.down_proj.weight for e in moe.experts]),
        "shared_up": moe.shared_experts.up_proj.weight,
        "shared_down": moe.shared_experts.down_proj.weight,
    }
    stored = {name: w.detach().numpy() for name, w in weights.items()}
    got = computed(Layer(shape, stored, {}), x[0].numpy(), shares)
    assert apart(got, want) < 1e-6
