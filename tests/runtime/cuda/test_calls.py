"""The calls, and those of the fake, fit NVIDIA's own bindings."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from tests.helpers.fake_cuda import FakeCuda
from twotower.errors import DeviceError
from twotower.runtime.cuda import calls
from twotower.runtime.cuda.calls import Cuda

NAMES = sorted(
    set(re.findall(r'_call\("(cuda\w+)"', inspect.getsource(calls)))
    | {"cudaGetErrorString", "cudaGetLastError"}
)


@pytest.mark.trt_rtx
@pytest.mark.parametrize("name", NAMES)
def test_every_call_exists_with_as_many_arguments(name: str) -> None:
    from cuda.bindings import runtime

    signature = getattr(runtime, name).__doc__.splitlines()[0]
    arguments = [a for a in signature.split("(", 1)[1].rstrip(")").split(",") if a.strip()]
    fake = inspect.signature(getattr(FakeCuda(), name))
    assert len(fake.parameters) == len(arguments), signature


@pytest.mark.trt_rtx
def test_the_real_bindings_take_plain_numbers() -> None:
    """Without a driver every call must fail in the driver, not in converting an argument."""
    from cuda.bindings import runtime

    cuda = Cuda(runtime)
    attempts = [
        lambda: cuda.copy(256, 512, 4, stream=16),
        lambda: cuda.copy_rows((256, 8), (512, 8), (2, 4), stream=16),
        lambda: cuda.clear_rows((256, 8), (2, 4), stream=16),
        lambda: cuda.record(5, stream=16),
        lambda: cuda.stream_waits(16, 5),
        lambda: cuda.begin_capture(16),
        lambda: cuda.launch(9, stream=16),
        lambda: cuda.allocate(256),
        lambda: cuda.create_stream(),
    ]
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("with a driver these would reach a GPU")
    for attempt in attempts:
        with pytest.raises(DeviceError, match=r"cuda\w+"):
            attempt()


def test_an_error_survives_the_way_to_another_process() -> None:
    api = FakeCuda()
    api.fail["cudaMalloc"] = (1, 700)
    with pytest.raises(DeviceError) as error:
        Cuda(api).allocate(8)
    assert pickle.loads(pickle.dumps(error.value)).found == error.value.found


@pytest.mark.parametrize(("cores", "sleeps"), [(1, True), (2, True), (3, False), (64, False)])
def test_whoever_waits_sleeps_where_cores_are_few(cores: int, sleeps: bool) -> None:
    api = FakeCuda()
    event = Cuda(api, cores=cores).create_event()
    assert bool(api._events[event].flags & 1) is sleeps
    assert api._events[event].flags & 2, "without timing"


def test_no_memory_is_a_memory_error_and_others_are_not() -> None:
    api = FakeCuda(memory=100)
    with pytest.raises(MemoryError):
        Cuda(api).allocate(1000)
