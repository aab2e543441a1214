"""Launches through the driver: what it is given, and that its errors are not swallowed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tools.gpu.cubins import bfloat16_bits, expected_product
from tools.gpu.driver import Driver, Kernel

FACTS = {
    "entry": "it",
    "threads": 128,
    "shared": 61440,
    "arguments": ["*bf16", "i32", "fp32"],
    "nulls": 2,
}


class FakeDriver:
    """The few functions a launch needs; keeps what was launched, as the driver reads it."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, *, libraries: bool = True) -> None:
        self.libraries = libraries
        self.attributes: list[tuple[int, int]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.code = 0

    def cuLibraryLoadData(self, *args: Any) -> tuple[int, int]:
        return (0, 11) if self.libraries else (801, 0)

    def cuLibraryGetKernel(self, library: int, entry: bytes) -> tuple[int, int]:
        assert (library, entry) == (11, b"it")
        return 0, 12

    def cuKernelGetFunction(self, kernel: int) -> tuple[int, int]:
        return 0, 13

    def cuModuleLoadData(self, address: int) -> tuple[int, int]:
        return 0, 21

    def cuModuleGetFunction(self, module: int, entry: bytes) -> tuple[int, int]:
        assert (module, entry) == (21, b"it")
        return 0, 23

    def cuFuncSetAttribute(self, function: int, name: int, value: int) -> tuple[int]:
        self.attributes.append((name, value))
        return (0,)

    def cuLaunchKernel(self, function: int, *args: Any) -> tuple[int]:
        *where, table, extra = args
        pointers = (ctypes.c_void_p * 5).from_address(table)
        kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64)
        values = [k.from_address(p).value for k, p in zip(kinds, pointers, strict=True)]
        self.launches.append((function, where, values, extra))
        return (self.code,)


class FakeRuntime:
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:
        return (0,)


def kernel(tmp_path: Path, fake: FakeDriver) -> Kernel:
    (tmp_path / "it.cubin").write_bytes(b"code")
    return Kernel(Driver(fake, FakeRuntime()), tmp_path / "it.cubin", FACTS)


@pytest.mark.parametrize(("libraries", "function"), [(True, 13), (False, 23)])
def test_a_launch_passes_grid_threads_memory_and_arguments(
    tmp_path: Path, libraries: bool, function: int
) -> None:
    fake = FakeDriver(libraries=libraries)
    one = kernel(tmp_path, fake)
    assert one.loaded_by.startswith("library" if libraries else "module, because cuLibraryLoadData")
    assert fake.attributes == [(8, 61440)], "more than 48 KB of shared memory is asked for"
    run = one.bind((29, 6, 1), [0x7F00_0000_1234, -5, 0.5])
    run(77)
    run(78)
    first, second = fake.launches
    assert first == (
        function,
        [29, 6, 1, 128, 1, 1, 61440, 77],
        [0x7F00_0000_1234, -5, 0.5, 0, 0],
        0,
    )
    assert second[1][-1] == 78


def test_arguments_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        kernel(tmp_path, FakeDriver()).bind((1, 1, 1), [1, 2])


def test_a_failed_launch_is_an_error(tmp_path: Path) -> None:
    fake = FakeDriver()
    run = kernel(tmp_path, fake).bind((1, 1, 1), [1, 2, 3.0])
    fake.code = 700
    with pytest.raises(RuntimeError, match="cuLaunchKernel: 700"):
        run(1)


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    value, bits = bfloat16_bits(np.array([1.0, -2.5, 3.1415927], np.float32))
    assert bits.tolist() == [0x3F80, 0xC020, 0x4049]
    assert value.tolist() == [1.0, -2.5, 3.140625]


def test_the_expected_product_follows_its_list() -> None:
    x = np.array([[[1.0, 2.0]], [[1.0, -1.0]]], np.float32)
    weights = np.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, -3.0]]], np.float32)
    wanted = expected_product(x, weights, np.array([1, 0], np.int32))
    assert wanted.tolist() == [[[16.0, 0.0]], [[1.0, 0.0]]]
