"""A GPU that fails for good: the first failure is seen, and freeing everything is tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.goldens import DIFFUSION
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import open_fake
from twotower.errors import DeviceError
from twotower.runtime import cleanup

CALLS = (
    "cudaSetDevice",
    "cudaMemcpyAsync",
    "cudaEventSynchronize",
    "cudaEventRecord",
    "cudaStreamWaitEvent",
    "cudaMemsetAsync",
    "cudaMemset2DAsync",
    "cudaMalloc",
    "cudaFree",
)
CAPTURE = (
    "cudaStreamBeginCapture",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
)
ONE = [((0,), 1, call) for call in (*CALLS, *CAPTURE)]
TWO = [((0, 1), 4, call) for call in CALLS]


def fail_third_wait(cuda: FakeCuda, code: int) -> None:
    """Lets the third wait for an event from now on fail; loading the weights has waited too."""
    done = cuda.counts["cudaEventSynchronize"]
    cuda.fail["cudaEventSynchronize"] = (done + 3, code)


@pytest.mark.parametrize(("devices", "pieces", "call"), [*ONE, *TWO])
def test_the_first_failure_is_seen_and_everything_is_let_go(
    opened: Any, devices: tuple[int, ...], pieces: int, call: str
) -> None:
    """`opened` holds that nothing is left."""
    with opened("hybrid-a", pieces, devices=devices) as it:
        stream = it.model.stream([8, 9], DIFFUSION)
        next(stream)
        it.model.generate([5, 6, 7], DIFFUSION)
        it.cuda.fail[call] = (it.cuda.counts[call] + 1, 700)
        for again in (False, True):
            with pytest.raises(DeviceError, match=f"error in {call}") as error:
                it.model.generate([5, 6, 7], DIFFUSION)  # in the memory of the last call
                it.model.generate([[5, 6, 7], [8]], DIFFUSION)  # in new memory
            assert ("every call since then fails" in error.value.found) is again
            assert "CUDA error 700" in error.value.found
            assert "new process" in error.value.do
        with pytest.raises(DeviceError, match=f"error in {call}"):
            next(stream)


def test_an_error_inside_a_with_statement_comes_out_of_it(
    opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What the clean-up hides is in the log."""
    says = "error in cudaEventSynchronize"
    with caplog.at_level("INFO"), pytest.raises(DeviceError, match=says), opened() as it:
        fail_third_wait(it.cuda, 700)
        it.model.generate([5, 6, 7], DIFFUSION)
    assert "every call since then fails" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    ["cudaMalloc", "cudaStreamCreateWithFlags", "cudaSetDevice", "cudaHostAlloc"],
)
@pytest.mark.parametrize("code", [700, 1])
def test_an_opening_that_fails_leaves_nothing(built: Any, call: str, code: int) -> None:
    """Whichever of its calls it is."""
    bundle, made = built("hybrid-a", 4), 0
    for number in range(1, 200):
        api = FakeCuda(devices=2)
        api.fail[call] = (number, code)
        try:
            towers = open_fake(bundle, FakeTensorRT(api), devices=(0, 1))
        except DeviceError as e:
            assert call in e.what
            assert not api.leaked
            made += 1
        else:
            towers.close()
            break
    assert made or call == "cudaHostAlloc"


def test_a_clean_up_that_ends_at_the_first_failure_is_found(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: frees in a plain loop. The fake notices what was never tried."""

    def plain(actions: Iterable[Callable[[], object]]) -> None:
        for action in actions:
            action()

    modules = "cuda.device_memory cuda.passes cuda.device_streams session workspace engines.towers"
    for module in modules.split():
        monkeypatch.setattr(f"twotower.runtime.{module}.close_all", plain)
    monkeypatch.setattr(cleanup, "close_all", plain)
    with pytest.raises(AssertionError, match="memory"), opened() as it:
        fail_third_wait(it.cuda, 700)
        with pytest.raises(DeviceError):
            it.model.generate([5, 6, 7], DIFFUSION)
