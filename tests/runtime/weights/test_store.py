"""Weights arrive bit for bit whenever copies run, are read once, and failures leave nothing."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.weight_files import bytes_on_device, record_of, write_weights
from twotower.bundle import FileRecord
from twotower.errors import BundleError, DeviceError, EngineMismatchError
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.weights.data_file import DataFile
from twotower.runtime.weights.store import LoadRequest, WeightStore
from twotower.runtime.weights.transfer import Ring
from twotower.weights.refs import PAGE, WeightRef

Patch = pytest.MonkeyPatch
SIZES = (2 << 20, 100, 64, 40_000, (1 << 20) + 50, 7, 2_000_000, 1 << 20, 0, 5_000)
ALL = slice(None)
SMALL = Ring(threads=2, slots=3, slot_bytes=16 * PAGE)


Store = Callable[..., tuple[WeightStore, FakeCuda]]


class File:
    """A data file with what asks for it."""

    def __init__(self, path: Path, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> None:
        path.parent.mkdir(exist_ok=True)
        self.path, self.weights = path, write_weights(path, sizes, seed=seed)
        self.record = record_of(path)
        self.content = path.read_bytes()

    def some(self, only: slice) -> dict[str, WeightRef]:
        return dict(list(self.weights.items())[only])

    def request(self, device: int = 0, only: slice = ALL) -> LoadRequest:
        return LoadRequest(self.path, self.record, self.some(only), device)

    def check(
        self, weights: WeightStore, api: FakeCuda, device: int = 0, only: slice = ALL
    ) -> None:
        """The device holds what the file does."""
        for name, weight in self.some(only).items():
            address = weights.address(self.path, name, device)
            assert address % 256 == 0
            if weight.nbytes:
                assert api.device_of(address) == device
                there = bytes_on_device(address, weight.nbytes)
                same = there == self.content[weight.offset : weight.end]
                assert same, name  # not the comparison: pytest would describe megabytes


def files_in(folder: Path, *names: str) -> list[File]:
    return [File(folder / name / "model.onnx.data", seed=n) for n, name in enumerate(names)]


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "denoiser" / "model.onnx.data")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Open files and threads are what they were."""
    files, threads = os.listdir("/proc/self/fd"), set(threading.enumerate())
    yield
    assert len(os.listdir("/proc/self/fd")) == len(files)
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def store() -> Iterator[Store]:
    """Makes stores that read in small chunks, each on a fake of its own; in the end all is freed."""
    made: list[tuple[WeightStore, FakeCuda]] = []

    def make(**options: Any) -> tuple[WeightStore, FakeCuda]:
        api = FakeCuda(**options)
        made.append((WeightStore(Cuda(api), SMALL), api))
        return made[-1]

    yield make
    for weights, api in made:
        weights.close()
        weights.close()
        assert not api.leaked


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_weights_arrive_whenever_copies_run(
    file: File, store: Store, seed: int | None, hashed: bool
) -> None:
    weights, api = store(seed=seed)
    loaded = weights.load([file.request()], hashed=hashed)
    assert api.pending == 0
    assert not hashed or loaded == file.record.size
    file.check(weights, api)
    assert api.counts["cudaMalloc"] == 1, "one allocation for a file"


@pytest.mark.parametrize("seed", [None, 1])
def test_slots_reused_too_early_are_found(
    file: File, store: Store, monkeypatch: Patch, seed: int | None
) -> None:
    """The injected fault: nobody waits for the event of a slot. The comparison above sees it."""
    monkeypatch.setattr(Cuda, "wait_event", lambda self, event: None)
    weights, api = store(seed=seed)
    weights.load([file.request()])
    with pytest.raises(AssertionError, match="w0"):
        file.check(weights, api)


def bytes_read(monkeypatch: Patch) -> list[int]:
    sizes: list[int] = []
    really = os.preadv

    def counted(handle: int, rooms: Any, at: int) -> int:
        sizes.append(really(handle, rooms, at))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return sizes


def test_what_several_engines_share_is_read_and_kept_once(
    file: File, store: Store, monkeypatch: Patch
) -> None:
    sizes = bytes_read(monkeypatch)
    weights, api = store()
    weights.load([file.request(only=slice(0, 6)), file.request(only=slice(4, 10)), file.request()])
    file.check(weights, api)
    assert sum(sizes) <= file.record.size
    assert api.counts["cudaMalloc"] == 1
    assert weights.load([file.request()]) == 0, "it is there"
    assert sum(sizes) <= file.record.size


def test_two_devices_take_their_layers(tmp_path: Path, store: Store, monkeypatch: Patch) -> None:
    files = files_in(tmp_path, "context", "denoiser")
    sizes = bytes_read(monkeypatch)
    weights, api = store(devices=2, seed=7)
    first, last = slice(0, 5), slice(3, 10)
    requests = [f.request(device, only) for f in files for device, only in ((0, first), (1, last))]
    weights.load(requests)
    for some in files:
        some.check(weights, api, 0, first)
        some.check(weights, api, 1, last)
        with pytest.raises(KeyError):
            weights.address(some.path, "w9", 0)
    assert sum(sizes) <= sum(f.record.size for f in files)
    assert api.counts["cudaMalloc"] == 4


def test_only_the_weights_of_a_segment_are_read(file: File, store: Store) -> None:
    weights, api = store()
    loaded = weights.load([file.request(only=slice(6, 8))])
    wanted = sum(w.nbytes for w in file.some(slice(6, 8)).values())
    assert wanted <= loaded < wanted + 4 * PAGE
    file.check(weights, api, only=slice(6, 8))
    weights.load([file.request()])
    file.check(weights, api)


def test_threads_read_ahead_while_copies_run(file: File, store: Store, monkeypatch: Patch) -> None:
    """Whenever a copy is waited for, reads behind it go on; reading and copying in turns fails."""
    sizes, waits = bytes_read(monkeypatch), 0
    really = Cuda.wait_event
    chunks = -(-file.record.size // SMALL.slot_bytes)

    def waited(self: Cuda, event: int) -> None:
        nonlocal waits
        waits += 1
        until = time.monotonic() + 10
        while len(sizes) < min(waits + 2, chunks - 4):
            assert time.monotonic() < until, "nothing is read while a copy is waited for"
            time.sleep(0.001)
        really(self, event)

    monkeypatch.setattr(Cuda, "wait_event", waited)
    weights, _ = store()
    weights.load([file.request()])
    assert waits > chunks - 8


def test_progress_counts_what_has_arrived(file: File) -> None:
    api, seen = FakeCuda(), []
    weights = WeightStore(Cuda(api), SMALL)

    def tick(done: int, total: int) -> None:
        seen.append((done, total))
        assert api.pending <= 3 * 20, "what is counted has been copied"

    loaded = weights.load([file.request()], progress=tick)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {loaded} == {seen[-1][0]}
    weights.close()


@pytest.mark.parametrize(("weight", "at"), [("w4", 9), ("w3", -1), ("w0", 0)])
def test_changed_bytes_are_found_by_the_hash(
    file: File, store: Store, weight: str, at: int
) -> None:
    """Also in the padding between weights."""
    content = bytearray(file.path.read_bytes())
    content[file.weights[weight].offset + at] ^= 1
    file.path.write_bytes(content)
    weights, api = store(seed=1)
    with pytest.raises(BundleError, match="has changed"):
        weights.load([file.request()], hashed=True)
    assert not api.leaked
    weights.load([file.request()])


def test_files_are_hashed_at_the_same_time(
    tmp_path: Path, store: Store, monkeypatch: Patch
) -> None:
    """The first pieces of both meet, which one after the other never would; each file in order."""
    files = [File(tmp_path / "a" / "x.data", seed=1), File(tmp_path / "b" / "x.data", SIZES[:5])]
    really, meeting = DataFile.hash, threading.Barrier(2)
    began: set[Path] = set()

    def hash_piece(self: DataFile, data: memoryview) -> None:
        if self.path not in began:
            began.add(self.path)
            meeting.wait(timeout=20)
        really(self, data)

    monkeypatch.setattr(DataFile, "hash", hash_piece)
    weights, api = store(seed=1)
    weights.load([file.request() for file in files], hashed=True)
    for file in files:
        file.check(weights, api)


def test_of_several_files_the_changed_one_is_named(tmp_path: Path, store: Store) -> None:
    files = files_in(tmp_path, "context", "denoiser")
    content = bytearray(files[1].content)
    content[-1] ^= 1
    files[1].path.write_bytes(content)
    weights, api = store(seed=1)
    with pytest.raises(BundleError, match=r"denoiser/model\.onnx\.data has changed"):
        weights.load([file.request() for file in files], hashed=True)
    assert not api.leaked


def test_a_table_that_does_not_fit_its_file(file: File, store: Store) -> None:
    weights, api = store()
    beyond = WeightRef("int8", (65,), file.record.size - 64)
    request = LoadRequest(file.path, file.record, {**file.weights, "beyond": beyond}, 0)
    with pytest.raises(BundleError, match=r"shorter than the table .*\n  found: beyond ends at"):
        weights.load([request])
    longer = FileRecord(file.record.size + 1, "")
    with pytest.raises(BundleError, match="is not as long as"):
        weights.load([LoadRequest(file.path, longer, file.weights, 0)])
    other = WeightRef("int8", (4,), 0)
    with pytest.raises(ValueError, match="w1"):
        weights.load([file.request(), LoadRequest(file.path, file.record, {"w1": other}, 0)])
    assert not api.calls, "found before anything is allocated"


@pytest.mark.parametrize(
    "act", [lambda path: os.truncate(path, 1 << 20), lambda path: os.utime(path, ns=(1, 1))]
)
def test_a_file_that_changes_while_it_is_read(
    file: File, store: Store, act: Callable[[Path], None]
) -> None:
    weights, api = store()
    with pytest.raises(BundleError, match="while it was read"):
        weights.load([file.request()], progress=lambda done, total: act(file.path))
    assert not api.leaked


def test_an_error_in_a_thread_is_the_error(file: File, store: Store, monkeypatch: Patch) -> None:
    really, count = os.preadv, 0

    def broken(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(5, "Input/output error")
        return really(*args)

    monkeypatch.setattr(os, "preadv", broken)
    weights, api = store(seed=2)
    with pytest.raises(BundleError, match="Input/output error"):
        weights.load([file.request()])
    assert not api.leaked


def test_an_interrupt_frees_everything(file: File, store: Store, monkeypatch: Patch) -> None:
    really = os.preadv
    free_pinned, reading = Cuda.free_pinned, 0

    def slow(*args: Any) -> int:
        nonlocal reading
        reading += 1
        time.sleep(0.02)
        try:
            return really(*args)
        finally:
            reading -= 1

    def freed(self: Cuda, address: int) -> None:
        assert not reading, "a thread still reads into the ring"
        free_pinned(self, address)

    monkeypatch.setattr(os, "preadv", slow)
    monkeypatch.setattr(Cuda, "free_pinned", freed)
    weights, api = store(seed=3)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.load([file.request()], progress=interrupt)
    assert not api.leaked


def test_too_little_memory_is_said_before_anything_is_allocated(file: File, store: Store) -> None:
    weights, api = store(memory=4_000_000)
    with pytest.raises(EngineMismatchError) as error:
        weights.load([file.request()])
    assert error.value.what == "the weights do not fit on GPU 0"
    assert "5.95 MiB needed (denoiser/model.onnx.data 5.95 MiB), 3.81 MiB of" in error.value.found
    assert "--devices 0,1" in error.value.do
    assert not api.counts["cudaMalloc"]


def test_memory_that_ends_meanwhile_takes_back_what_was_had(tmp_path: Path, store: Store) -> None:
    """Another program may take what was free; what an earlier call loaded stays."""
    files = files_in(tmp_path, *"abc")
    weights, api = store(devices=2)
    weights.load([files[0].request()])
    kept = api.leaked
    api.fail["cudaMalloc"] = (4, 2)
    with pytest.raises(EngineMismatchError, match=r"do not fit on GPU 1"):
        weights.load([files[1].request(), files[1].request(1), files[2].request(1)])
    assert api.leaked == kept
    files[0].check(weights, api)
    with pytest.raises(KeyError):
        weights.address(files[1].path, "w0", 0)


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize(
    "call",
    (
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaStreamCreateWithFlags",
        "cudaEventCreateWithFlags",
        "cudaMemcpyAsync",
        "cudaEventRecord",
        "cudaEventSynchronize",
    ),
)
def test_an_error_of_the_device_leaves_nothing(
    file: File, store: Store, call: str, number: int
) -> None:
    weights, api = store(devices=2, seed=number)
    api.fail[call] = (number, 700)
    if number > {"cudaMalloc": 2, "cudaHostAlloc": 1, "cudaStreamCreateWithFlags": 2}.get(call, 10):
        weights.load([file.request(0), file.request(1)])
    else:
        with pytest.raises(DeviceError, match=call):
            weights.load([file.request(0), file.request(1)])
        assert not api.leaked


ENDINGS = ("cudaStreamSynchronize", "cudaEventDestroy", "cudaStreamDestroy", "cudaFreeHost")


@pytest.mark.parametrize("call", ENDINGS)
def test_an_error_at_the_end_does_not_hide_the_first_one(file: File, call: str) -> None:
    api = FakeCuda()
    api.fail |= {"cudaMemcpyAsync": (2, 1), call: (1, 1)}
    with pytest.raises(DeviceError, match="cudaMemcpyAsync"):
        WeightStore(Cuda(api), SMALL).load([file.request()])
    assert sum(api.leaked.values()) <= 1, "what could not be freed, and nothing else"


def test_closing_goes_on_where_freeing_fails(tmp_path: Path) -> None:
    files = files_in(tmp_path, *"abc")
    api = FakeCuda()
    weights = WeightStore(Cuda(api), SMALL)
    weights.load([f.request() for f in files])
    api.fail["cudaFree"] = (1, 1)
    with pytest.raises(DeviceError, match="cudaFree"):
        weights.close()
    assert api.leaked == {"memory": 1}
    weights.close()


class Drain(FakeCuda):
    """A device of any size: what is copied to it goes into one small piece of memory."""

    SINK = 64 << 20

    def __init__(self) -> None:
        super().__init__(memory=1 << 50)
        self.sink = (ctypes.c_ubyte * self.SINK)()

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        self._blocks[1 << 50] = (memoryview(b""), 0)  # type: ignore[assignment]
        return 0, 1 << 50

    def cudaMemcpyAsync(self, target: int, source: int, size: int, *rest: int) -> Any:  # noqa: N802
        start = ctypes.addressof(self.sink) + target % (self.SINK // 2)
        copy = partial(ctypes.memmove, start, source, size)
        return self._answer("cudaMemcpyAsync", lambda: self.enqueue(rest[1], copy))


def anonymous() -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


def test_host_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Three gigabytes of holes, which take no room on the disk, pass through the ring alone."""
    path, size = tmp_path / "model.onnx.data", 3 << 30
    with path.open("wb") as opened:
        opened.truncate(size)
    api = Drain()
    weights = WeightStore(Cuda(api))
    whole = WeightRef("int8", (size,), 0)
    request = LoadRequest(path, FileRecord(size, ""), {"w": whole}, 0)
    before, peak = anonymous(), 0

    def tick(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous())

    weights.load([request], progress=tick)
    assert peak - before < Ring().slots * Ring().slot_bytes + Drain.SINK + (32 << 20)
