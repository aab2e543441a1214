"""Device buffers: cleared when made, spans copied and cleared, everything freed once."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from tests.helpers.fake_cuda import FakeCuda
from twotower.errors import DeviceError, RequestError
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceBuffer, DeviceMemory
from twotower.runtime.cuda.passes import downloads, uploads
from twotower.runtime.device import HostMemory, Span
from twotower.spec import TensorSpec, TowerSignature

KV = TensorSpec("past_key_values.0.key", "float32", ("B", 2, "T", 3))
IDS, LENGTHS, OUT = (
    TensorSpec("ids", "int64", ("B", "L")),
    TensorSpec("lengths", "int64", ("B",)),
    TensorSpec("out", "float32", ("B", 5)),
)


SIZE = 1 << 20


@pytest.fixture
def api() -> FakeCuda:
    return FakeCuda(devices=2, memory=SIZE)


@pytest.fixture
def device(api: FakeCuda) -> Iterator[DeviceMemory]:
    """Of two devices that both have `ids` and the state; in the end all is freed."""
    device = DeviceMemory(Cuda(api), (0, 1), {"ids": (0, 1), KV.name: (1, 0)})
    yield device
    device.close()
    device.close()
    assert not api.leaked


def on_device(buffer: DeviceBuffer, device: int = 0) -> np.ndarray:
    raw = (ctypes.c_ubyte * buffer.nbytes).from_address(buffer.addresses[device])
    return np.frombuffer(raw, {"float32": np.float32, "int64": np.int64}[buffer.dtype]).reshape(
        buffer.shape
    )


def test_spans_are_cleared_and_copied_as_on_the_host(device: DeviceMemory) -> None:
    host = HostMemory()
    small, large = {"B": 2, "T": 8}, {"B": 2, "T": 16}
    buffers = [(device.state(KV, sizes), host.state(KV, sizes)) for sizes in (small, large)]
    values = np.random.default_rng(0).random((2, 2, 8, 3), np.float32)
    for place in (0, 1):
        assert not on_device(buffers[0][0], place).any(), "memory is cleared when it is made"
        on_device(buffers[0][0], place)[...] = values
    buffers[0][1][...] = values
    for where, it in ((device, 0), (host, 1)):
        where.copy(buffers[0][it], buffers[1][it], Span(2, 0, 5))
        where.clear(buffers[0][it], Span(2, 0, 3))
        where.clear(buffers[0][it], Span(2, 0, 0))
    for ours, theirs in buffers:
        for place in (0, 1):
            np.testing.assert_array_equal(on_device(ours, place), theirs)
    assert buffers[0][0].home == 1


def test_small_arrays_travel_in_one_copy(device: DeviceMemory) -> None:
    made = device.small([LENGTHS, IDS, OUT], {"B": 2, "L": 64})
    narrow = device.view(made["ids"], (2, 4))
    signature = TowerSignature("some", (IDS, LENGTHS), (OUT,))
    buffers = {**made, "ids": narrow}
    up, down = uploads(signature, buffers), downloads(signature, buffers)
    assert sorted(t.device for t in up) == [0, 1], "one a device"
    assert len(down) == 1
    assert max(t.size for t in up) < 2 * 64 * 8, "what a narrow chunk leaves unused does not travel"
    device.host(narrow)[...] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    device.host(made["lengths"])[...] = [9, 10]
    for t in up:
        ctypes.memmove(t.target, t.source, t.size)
    np.testing.assert_array_equal(on_device(narrow, 1), [[1, 2, 3, 4], [5, 6, 7, 8]])
    np.testing.assert_array_equal(on_device(made["lengths"]), [9, 10])
    on_device(made["out"])[...] = 7
    for t in down:
        ctypes.memmove(t.target, t.source, t.size)
    assert (device.host(made["out"]) == 7).all()


def test_buffers_are_given_back_once(device: DeviceMemory) -> None:
    made = device.small([LENGTHS, IDS], {"B": 2, "L": 4})
    state = device.state(KV, {"B": 1, "T": 4})
    device.release([*made.values(), state])
    device.release([*made.values(), state])
    device.scratch(1000, 1)


def test_device_memory_is_freed_where_pinned_memory_cannot_be_had(
    api: FakeCuda, device: DeviceMemory
) -> None:
    api.fail["cudaHostAlloc"] = (1, 2)
    with pytest.raises(DeviceError, match="cudaHostAlloc"):
        device.small([LENGTHS, IDS], {"B": 2, "L": 4})


def test_a_buffer_on_two_devices_is_had_on_both_or_not_at_all(device: DeviceMemory) -> None:
    assert device.scratch(SIZE - 500, 0)
    with pytest.raises(RequestError, match=r"not enough memory for 4 row\(s\)"):
        device.state(KV, {"B": 4, "T": 100})
