"""The NumPy twin: against float64 in every format, and rows apart from their batch."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.expert_layers import (
    FORMAT_NAMES,
    ROUTINGS,
    exact,
    make_shape,
    random_layer,
    routing,
    tokens,
)
from twotower.dtypes import to_float32
from twotower.kernels import experts_twin

TO_FLOAT64 = {"float32": 2e-6, "float16": 1.5e-3, "bfloat16": 8e-3}
"""Relative to the norm; in half widths some roundings of half a unit in the last place each."""


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("routed", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", TO_FLOAT64)
def test_it_computes_the_layer(dtype: str, routed: str, kind: str) -> None:
    layer = random_layer(
        make_shape(128, 128, 8, 3, shared=256, dtype=dtype, routed=routed, others=routed)
    )
    x, shares = tokens(layer.shape, 5), routing(layer.shape, 5, kind)
    got = to_float32(experts_twin(layer.shape, x, shares, layer.stored), dtype)
    want = exact(layer, x, shares)
    assert np.linalg.norm(got - want) < TO_FLOAT64[dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("routed", ("float", "int8", "int4-32"))
@pytest.mark.parametrize("dtype", TO_FLOAT64)
def test_a_row_does_not_depend_on_its_batch(dtype: str, routed: str) -> None:
    layer = random_layer(make_shape(128, 96, 8, 3, shared=128, dtype=dtype, routed=routed))
    x, shares = tokens(layer.shape, 33), routing(layer.shape, 33, "skewed")
    whole = experts_twin(layer.shape, x, shares, layer.stored)
    for first, count in ((0, 1), (7, 2), (12, 16), (32, 1)):
        part = slice(first, first + count)
        alone = experts_twin(layer.shape, x[part].copy(), shares[:, part].copy(), layer.stored)
        assert alone.tobytes() == whole[part].tobytes()


def test_what_nobody_chose_is_not_read() -> None:
    layer = random_layer(make_shape(32, 32, 6, 2))
    x, shares = tokens(layer.shape, 4), routing(layer.shape, 4, "one")
    want = experts_twin(layer.shape, x, shares, layer.stored)
    empty = np.flatnonzero(~shares.any(1))
    assert len(empty) == 4
    spoilt = {name: array.copy() for name, array in layer.stored.items()}
    for array in spoilt.values():
        array[empty] = np.nan
    assert experts_twin(layer.shape, x, shares, spoilt).tobytes() == want.tobytes()
