"""Expert kernels on a device: loaded, bound, launched, captured, replayed with other routings."""

from __future__ import annotations

import timeit
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import Layer, make_shape, random_layer, routing, tokens
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.fake_kernels import write_kernels
from twotower.errors import BundleError, DeviceError, EngineMismatchError, RequestError
from twotower.kernels import Manifest, experts_twin, scratch_bytes
from twotower.runtime.cuda.calls import Cuda, KernelDriver
from twotower.runtime.engines.kernel_experts import ExpertCode, ExpertStep

LAUNCH_US = 3.0
"""Of our own Python a launch; the call of the driver is not ours."""


class Device:
    """A layer's arrays in a fake's memory."""

    def __init__(self, layer: Layer, count: int, api: FakeCuda, manifest: Manifest) -> None:
        self.api, self.cuda = api, Cuda(api)
        self.code = ExpertCode(manifest.folder, self.cuda, 0)
        self.stream = self.cuda.create_stream()
        x = tokens(layer.shape, count)
        self.arrays = {
            "x": x,
            "shares": routing(layer.shape, count),
            "out": x.copy(),
            **layer.stored,
        }
        self.addresses = {name: self.put(array) for name, array in self.arrays.items()}
        self.scratch = self.cuda.allocate(scratch_bytes(layer.shape, count))
        self.step = ExpertStep(self.code, count, self.addresses, self.scratch)

    def put(self, array: np.ndarray) -> int:
        address = self.cuda.allocate(array.nbytes)
        self.write(address, array)
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        self.cuda.copy(address, array.ctypes.data, array.nbytes, stream=self.stream)
        self.cuda.synchronize(self.stream)

    def out(self) -> np.ndarray:
        self.cuda.synchronize(self.stream)
        raw = bytes(self.cuda.bytes_at(self.addresses["out"], self.arrays["out"].nbytes))
        return np.frombuffer(raw, self.arrays["out"].dtype).reshape(self.arrays["out"].shape)


@pytest.fixture(autouse=True)
def host_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of NumPy's own count as host memory."""
    known = FakeCuda.device_of

    def device_of(self: FakeCuda, address: int, size: int = 1) -> int | None:
        try:
            return known(self, address, size)
        except AssertionError:
            blocks = [(start, block.nbytes) for start, (block, _) in self._blocks.items()]
            if any(start <= address < start + size for start, size in blocks):
                raise  # it begins in an allocation and runs out of it
            return None

    monkeypatch.setattr(FakeCuda, "device_of", device_of)


def device(tmp_path: Path, count: int = 5, **options: Any) -> tuple[Layer, Device]:
    defaults = {"shared": 96, "dtype": "bfloat16", "routed": "int4-32"}
    shape = make_shape(64, 64, 8, 2, **{**defaults, **options})
    layer = random_layer(shape)
    return layer, Device(layer, count, FakeCuda(), write_kernels(tmp_path / "k", shape, (80, 90)))


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_kernels(tmp_path / "k", make_shape(64, 64, 8, 2), (80, 90))


COUNTS = {"float": 1, "int8": 16, "fp8": 9, "int4-64": 70, "nvfp4": 16, "mxfp4": 3}


@pytest.mark.parametrize(("routed", "count"), [*COUNTS.items(), ("float", 520)])
def test_a_step_computes_the_layer(tmp_path: Path, routed: str, count: int) -> None:
    layer, d = device(tmp_path, count, routed=routed)
    d.step.enqueue(d.stream)
    want = experts_twin(layer.shape, d.arrays["x"], d.arrays["shares"], layer.stored)
    assert d.out().tobytes() == want.tobytes()
    assert len(d.step) == len(d.api.launched) == (4 if count <= 512 else 5)


def test_one_captured_graph_serves_every_routing(tmp_path: Path) -> None:
    layer, d = device(tmp_path, 12)
    d.step.enqueue(d.stream)
    d.cuda.synchronize(d.stream)
    d.cuda.begin_capture(d.stream)
    d.step.enqueue(d.stream)
    graph = d.cuda.instantiate(d.cuda.end_capture(d.stream))
    before = len(d.api.launched)
    for seed, kind in ((7, "uniform"), (8, "one"), (9, "fewer")):
        shares = routing(layer.shape, 12, kind, seed)
        d.write(d.addresses["shares"], shares)
        d.cuda.launch(graph, stream=d.stream)
        want = experts_twin(layer.shape, d.arrays["x"], shares, layer.stored)
        assert d.out().tobytes() == want.tobytes()
    assert len(d.api.launched) == before, "no launch but those of the graph"


def test_each_device_loads_the_files_of_its_own_capability(manifest: Manifest) -> None:
    api = FakeCuda(devices=2, sm=80)
    code = ExpertCode(manifest.folder, Cuda(api), 1)
    assert code.sm == 80
    assert {loaded["sm"] for loaded in api.loaded.values()} == {80}
    assert api.current == 1
    code.close()
    assert not api.loaded


def test_a_gpu_without_kernels_is_refused(manifest: Manifest) -> None:
    with pytest.raises(EngineMismatchError, match="SM 120") as e:
        ExpertCode(manifest.folder, Cuda(FakeCuda(sm=120)), 0)
    check_error(str(e.value), "not compiled for this GPU")
    assert "80, 90" in e.value.found
    assert "--sm 80,90,120 --experts kernels --force" in e.value.do
    with pytest.raises(EngineMismatchError, match="SM 103") as e:
        ExpertCode(manifest.folder, Cuda(FakeCuda(sm=103)), 0)
    assert "--experts dense" in e.value.do


def test_more_tokens_than_kernels_were_compiled_for_are_refused(manifest: Manifest) -> None:
    code = ExpertCode(manifest.folder, Cuda(FakeCuda()), 0)
    code.manifest = replace(manifest, max_tokens=64)
    assert code.launches(64)
    mend = "--experts kernels --force` with a larger --max-batch"
    for count, most, do in ((65, 64, mend), (5000, 4096, "")):
        with pytest.raises(RequestError, match=f"{count} tokens") as e:
            code.launches(count)
        check_error(str(e.value), f"{count} tokens")
        assert f"at most {most}" in e.value.found
        assert do in e.value.do


def test_a_damaged_file_is_refused_and_nothing_stays_loaded(manifest: Manifest) -> None:
    (manifest.folder / manifest.cubins[-1].file).write_bytes(b"\0")
    api = FakeCuda()
    with pytest.raises(BundleError, match="damaged"):
        ExpertCode(manifest.folder, Cuda(api), 0)
    assert not api.loaded


def test_what_the_driver_does_not_load_is_named() -> None:
    with pytest.raises(DeviceError, match=r"does not load the compiled kernel up\.cubin") as e:
        KernelDriver(FakeCuda()).load(b"not a cubin", "up.cubin")
    check_error(str(e.value), "up.cubin")
    assert "200" in e.value.found


def test_a_refused_launch_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, d = device(tmp_path)
    monkeypatch.setattr(d.api, "cuLaunchKernel", lambda *_: (701,))
    step = ExpertStep(d.code, 5, d.addresses, d.scratch)
    with pytest.raises(DeviceError, match="cuLaunchKernel") as e:
        step.enqueue(d.stream)
    check_error(str(e.value), "cuLaunchKernel")
    assert "701" in e.value.found


class Recorded:
    """A driver that does nothing but note what it is given."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        self.tables: set[int] = set()

    def cuLaunchKernel(self, *args: Any) -> tuple[int]:  # noqa: N802 - the library's name
        self.tables.add(args[9])
        return (0,)


def test_parameters_are_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a launch takes little time: the best of some rounds, which others do not disturb."""
    _, d = device(tmp_path)
    recorded = Recorded()
    monkeypatch.setattr(d.cuda.kernels, "_api", recorded)
    step = ExpertStep(d.code, 5, d.addresses, d.scratch)
    best = min(timeit.repeat(lambda: step.enqueue(1), number=200, repeat=20))
    assert len(recorded.tables) == len(step)
    launch_us = best / 200 / len(step) * 1e6
    assert launch_us < LAUNCH_US, f"{launch_us:.2f} us a launch"


def test_scratch_memory_is_large_enough_to_the_byte(tmp_path: Path) -> None:
    """The fake refuses accesses beyond an allocation: with less memory than said there are some."""
    layer, d = device(tmp_path, 9)
    scratch = d.cuda.allocate(scratch_bytes(layer.shape, 9) - 2048)
    ExpertStep(d.code, 9, d.addresses, scratch).enqueue(d.stream)
    with pytest.raises(AssertionError, match="lie in no allocation"):
        d.cuda.synchronize(d.stream)
