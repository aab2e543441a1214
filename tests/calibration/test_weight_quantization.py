"""Quantizing weights: against torch, against ModelOpt, and what must hold of any weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_quantization import fake_quantize
from twotower.calibration.weight_quantization import (
    expand_rows,
    global_scale,
    numpy_dtype,
    pack,
    quantize_rows,
)
from twotower.config.formats import FORMATS, WeightFormat, stored_format
from twotower.weights.mapped import read_weight
from twotower.weights.refs import WeightRef

FORMS = {name: stored_format(name, 256, stacked=True, rounded_input=True) for name in FORMATS}
DTYPES = ("float32", "float16", "bfloat16")


def weights(seed: int, rows: int = 24, columns: int = 256) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns), dtype=np.float32) * np.exp(
        rng.normal(-3, 1, (rows, 1))
    ).astype(np.float32)
    x.reshape(-1)[rng.integers(0, x.size, 20)] *= 12
    x[3] = 0.0
    return x


def rounded(
    x: np.ndarray[Any, Any], how: WeightFormat, dtype: str, rounding: str
) -> tuple[Any, Any, Any]:
    shared = global_scale(float(np.abs(x).max()), how, dtype) if how.scale_dtype else None
    return (*quantize_rows(x, how, dtype, rounding=rounding, shared=shared), shared)


@pytest.mark.parametrize("name", FORMS)
def test_plain_rounding_is_torch_s(name: str) -> None:
    """To the last bit, by other code and other types."""
    x = weights(1)
    values, scales, shared = rounded(x, FORMS[name], "float32", "plain")
    expected = fake_quantize(torch.from_numpy(x), name, group=FORMS[name].group).numpy()
    np.testing.assert_array_equal(expand_rows(values, scales, shared), expected)


@pytest.mark.trained
def test_nvfp4_is_modelopt_s() -> None:
    """NVIDIA's own library for the format, which divides in another order."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = weights(2)
    values, scales, shared = rounded(x, FORMS["nvfp4"], "float32", "plain")
    quantized, theirs, whole = NVFP4QTensor.quantize(torch.from_numpy(x), 16)
    assert float(whole) == pytest.approx(float(shared), rel=1e-6)
    alive = np.abs(x.reshape(len(x), -1, 16)).max(-1) > 0  # of a group of zeros any scale will do
    assert (theirs.float().numpy()[alive] == scales.astype(np.float32)[alive]).mean() > 0.999
    expected = quantized.dequantize(
        dtype=torch.float32, fast=False, scale=theirs, double_scale=whole, block_sizes={-1: 16}
    ).numpy()
    assert (
        np.abs(expand_rows(values, scales, shared) - expected) <= 1e-6 * np.abs(x).max()
    ).mean() > 0.999


@pytest.mark.parametrize("rounding", ["plain", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_scales_are_positive_values_in_range_and_what_is_stored_is_read_back(
    name: str, dtype: str, rounding: str
) -> None:
    how = FORMS[name]
    values, scales, shared = rounded(weights(3), how, dtype, rounding)
    assert scales.dtype == numpy_dtype(how.scale_dtype or dtype)
    assert (scales.astype(np.float64) > 0).all(), "TensorRT takes no other, also for a row of zeros"
    assert np.abs(values.astype(np.float32)).max() <= how.largest
    raw = pack(values, how.dtype)
    assert len(raw) == values.size * how.bits // 8
    back = read_weight(raw, WeightRef(how.dtype, values.shape, 0))
    np.testing.assert_array_equal(back.astype(np.float32), values.astype(np.float32))
    assert not expand_rows(values, scales, shared)[3].any(), "zeros stay zeros"


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(["int8", "int4"]),
    dtype=st.sampled_from(DTYPES),
)
def test_an_integer_is_never_further_than_half_a_step(seed: int, name: str, dtype: str) -> None:
    x = weights(seed)
    values, scales, _ = rounded(x, FORMS[name], dtype, "plain")
    step = np.repeat(scales.astype(np.float32), x.shape[1] // scales.shape[1], axis=1)
    # A scale rounded down lets the greatest weight of a group lie beyond the last step by its own
    # rounding.
    rounding = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    beyond = FORMS[name].largest * step * rounding
    assert (np.abs(expand_rows(values, scales) - x) <= step / 2 + beyond + 2.0**-24).all()


@given(seed=st.integers(0, 10**6), name=st.sampled_from(["int8", "int4", "nvfp4"]))
def test_clipping_never_costs_more_than_plain_rounding(seed: int, name: str) -> None:
    x = weights(seed, rows=6)
    errors = {}
    for rounding in ("plain", "mse"):
        values, scales, shared = rounded(x, FORMS[name], "float32", rounding)
        difference = (expand_rows(values, scales, shared) - x).reshape(len(x), scales.shape[1], -1)
        errors[rounding] = np.square(difference, dtype=np.float64).sum(-1)
    assert (errors["mse"] <= errors["plain"] * (1 + 1e-5) + 1e-12).all()


def test_clipping_gains_where_few_weights_stand_out() -> None:
    x = weights(5)
    plain, clipped = (
        float(np.square(expand_rows(*rounded(x, FORMS["int4"], "float32", r)[:2]) - x).sum())
        for r in ("plain", "mse")
    )
    assert clipped < 0.95 * plain
