"""The CUDA layer's own checks hold on the fake, and find what it is made to do wrong."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from twotower.doctor.cuda_layer import check_cuda, copy_rates
from twotower.runtime.cuda.calls import Cuda


def outcomes(api: FakeCuda) -> dict[str, bool | None]:
    return {result.name: result.ok for result in check_cuda(Cuda(api))}


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_sound_layer_passes_every_check(seed: int | None) -> None:
    api = FakeCuda(seed=seed)
    seen = outcomes(api)
    assert len(seen) == 4
    assert set(seen.values()) == {True}
    assert not api.leaked


def test_an_event_that_holds_nothing_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeCuda()
    monkeypatch.setattr(api, "cudaStreamWaitEvent", lambda stream, event, flags: (0,))
    assert outcomes(api)["copies on two streams in the order of an event"] is False


def test_a_graph_that_replays_what_was_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeCuda()
    copy = api.cudaMemcpyAsync

    def frozen(target: int, source: int, size: int, kind: int, stream: int) -> Any:
        if not api.capturing(stream):
            return copy(target, source, size, kind, stream)
        data = ctypes.string_at(source, size)
        api.enqueue(stream, lambda: ctypes.memmove(target, data, size) and None)
        return (0,)

    monkeypatch.setattr(api, "cudaMemcpyAsync", frozen)
    seen = outcomes(api)
    assert seen["copies are captured as a graph"] is True
    assert seen["a replayed graph reads what is there then"] is False


def test_no_capture_is_a_failed_check() -> None:
    api = FakeCuda()
    api.fail["cudaGraphInstantiate"] = (1, 900)
    seen = outcomes(api)
    assert seen["copies are captured as a graph"] is False
    assert "a replayed graph reads what is there then" not in seen
    assert not api.leaked


def test_rates_are_of_bytes_that_moved() -> None:
    api = FakeCuda()
    rates = copy_rates(Cuda(api), size=1 << 16)
    assert set(rates) == {"within the device", "to the device", "to the host"}
    assert min(rates.values()) > 0
    assert not api.leaked
