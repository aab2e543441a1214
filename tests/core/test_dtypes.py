"""The table of element types, held to the libraries it speaks of."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from twotower.dtypes import (
    DTYPES,
    FLOATS,
    carried_dtype,
    dtype_of_onnx,
    item_bytes,
    numpy_dtype,
    stored_bytes,
    to_float32,
    to_stored,
)

UNPACKED = ("int4", "uint4")


@pytest.mark.parametrize("name", DTYPES)
def test_a_type_is_onnx_s_of_that_number(name: str) -> None:
    code = DTYPES[name].onnx
    assert dtype_of_onnx(code) == name
    told = str(TensorProto.DataType.Name(code)).lower()
    assert {"float": "float32"}.get(told, told) == name
    if name not in UNPACKED:
        assert numpy_dtype(name) == helper.tensor_dtype_to_np_dtype(code)


def test_a_number_that_is_no_type_of_ours_has_no_name() -> None:
    assert dtype_of_onnx(TensorProto.UNDEFINED) is None
    assert dtype_of_onnx(TensorProto.COMPLEX64) is None


@pytest.mark.parametrize("name", DTYPES)
def test_bits_are_numpy_s_but_of_four(name: str) -> None:
    bits = DTYPES[name].bits
    assert stored_bytes(name, 7) == (7 * bits + 7) // 8
    if bits == 4:
        assert numpy_dtype(name).itemsize == 1
    else:
        assert item_bytes(name) == numpy_dtype(name).itemsize == carried_dtype(name).itemsize


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_rounded_as_torch_rounds_them(name: str) -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(
        2.0**10
    )
    values[:4] = [np.inf, -np.inf, np.nan, 1e38]
    raw = to_stored(values, name)
    assert raw.dtype == carried_dtype(name)
    got = to_float32(raw, name)
    want = torch.from_numpy(values).to(getattr(torch, name)).float().numpy()
    np.testing.assert_array_equal(got, want)


def test_every_code_of_a_float_of_eight_bits_is_read() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        to_float32(codes, "float8e4m3fn"), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )
    scales = to_float32(codes[:-1], "float8e8m0")
    np.testing.assert_array_equal(scales.astype(np.float64), 2.0 ** (np.arange(255) - 127.0))
