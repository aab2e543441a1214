"""The fakes notice what a GPU would punish: each test injects a fault and sees it found."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.goldens import golden_cases
from tests.helpers.towers import golden_config
from twotower.errors import DeviceError
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.passes import DevicePass
from twotower.runtime.engines import trt_engine
from twotower.runtime.engines.handover import Handover
from twotower.runtime.workspace import ContextState, Workspace
from twotower.spec import RESIDUAL_IN


def rebound_after_capture(work: Workspace) -> Any:
    """`Workspace.denoise` with one binding, told the other set of states in between."""
    binding = work._denoiser.setdefault(0, None) or work._towers.denoiser.bind(
        {**work._denoiser_arrays.by_name, **work._state.reads(0)},
    )
    work._denoiser[0] = binding
    segments = binding._work.enqueue.__self__
    for bound in segments._bound:
        for name, buffer in work._state.reads(work._state.current).items():
            context = bound.enqueue.__self__.context
            context.set_tensor_address(name, buffer.addresses[bound.device])
    return binding.run(work.streams.denoiser)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_captured_launch_keeps_the_addresses_it_was_captured_with(
    opened: Any, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Launched anew a pass takes the new addresses; a replayed graph reads the old state."""
    case = next(c for c in golden_cases("hybrid-a") if c["params"]["max_new_tokens"] > 32)
    monkeypatch.setattr(Workspace, "denoise", rebound_after_capture)
    with opened(graphs=graphs) as it:
        out = it.model.generate(case["prompt"], golden_config(case))
    assert (list(out.tokens) == case["diffusion_tokens"]) is not graphs


def test_work_beside_a_stream_is_joined() -> None:
    """In any order the fake may choose: after what was before it, before what comes after."""
    for seed in (None, 1, 2, 3):
        api, done = FakeCuda(seed=seed), []
        _, stream = api.cudaStreamCreateWithFlags(1)
        for n in range(6):
            enqueue = api.enqueue_aside if n % 2 else api.enqueue
            enqueue(stream, partial(done.append, n))
        assert seed is not None or not done
        api.cudaStreamSynchronize(stream)
        assert done == list(range(6))
        api.cudaStreamDestroy(stream)
        assert not api.leaked


def test_the_current_device_belongs_to_a_thread(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injected: a device that is current is not made current again, whichever thread asks."""
    use, known = Cuda.use, []

    def remembered(cuda: Cuda, device: int) -> None:
        if known[-1:] != [device]:
            known.append(device)
            use(cuda, device)

    monkeypatch.setattr(Cuda, "use", remembered)
    failed: list[BaseException] = []

    def generate() -> None:
        try:
            it.model.generate([5, 6, 7])
        except AssertionError as e:
            failed.append(e)

    with opened(devices=(1,)) as it:
        generate()
        assert not failed, "in one thread it is no fault"
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        assert "device 0 is current" in str(failed[0])
        known.clear()


def test_a_library_allocates_when_it_runs_a_shape_first(
    opened: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Injected: the first run of a pass is captured. Later shapes would be no better."""
    make = DevicePass.__init__

    def hasty(self: DevicePass, *args: Any) -> None:
        make(self, *args)
        self._runs = 1

    monkeypatch.setattr(DevicePass, "__init__", hasty)
    with opened() as it:
        it.model.generate([5, 6, 7])
    assert "cudaMalloc during capture" in caplog.text


WRITES = ContextState.writes


def keys_at_values(state: ContextState, which: int) -> dict[str, Any]:
    """Two addresses of one cache."""
    made = WRITES(state, which)
    first, second = [n for n in made if "conv" not in n and "ssm" not in n][:2]
    return {**made, first: made[second]}


def one_buffer(handover: Handover, name: str, _: int) -> int:
    return handover.addresses.get(name, handover.addresses[RESIDUAL_IN])[0]


@pytest.mark.parametrize(
    ("owner", "name", "fault", "says"),
    [
        (ContextState, "writes", keys_at_values, "should alias but memory addresses differ"),
        (Cuda, "synchronize", lambda cuda, stream: None, "outside of profile None"),
        (trt_engine, "_profile", lambda plan, sizes: 0, "outside of profile"),
        (Handover, "address", one_buffer, "residual_out is written where an input is read"),
    ],
)
def test_what_the_library_refuses(
    opened: Any, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any, says: str
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with opened(pieces=4) as it:
        it.model._limits = replace(it.model._limits, max_batch=8)
        with pytest.raises(DeviceError, match=says):
            # More rows than the first profile has.
            it.model.generate([[5, 6, 7]] * (5 if owner is trt_engine else 1))
