"""The TensorRT runtime on fakes: the references' tokens in any order of the device's work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers.goldens import (
    DIFFUSION,
    check_golden,
    check_goldens,
    check_rows,
    golden_cases,
    random_prompt,
)
from tests.helpers.trt.execution import Context
from twotower import GenerationConfig, TwoTower
from twotower.builders import build_engines, builder_for
from twotower.errors import DeviceError
from twotower.runtime import Request

LAYOUTS = {
    "one device": {"devices": (0,)},
    "plain launches": {"devices": (0,), "graphs": False},
    "random order": {"devices": (0,), "seed": 1},
    "two devices": {"devices": (0, 1), "seed": 2},
    "two devices the other way": {"devices": (1, 0)},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("folder", ["hybrid-a", pytest.param("hybrid-b", marks=pytest.mark.slow)])
def test_the_goldens(opened: Any, folder: str, layout: str) -> None:
    with opened(folder, **LAYOUTS[layout]) as it:
        check_goldens(it.model, golden_cases(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "seed"),
    [((0,), None), ((0,), 3), ((0, 1), 4), ((0, 1, 2, 3), None), ((0, 1, 2, 3), 5), ((2, 0, 1), 6)],
)
def test_segments_write_the_same_text_on_any_number_of_devices(
    opened: Any, devices: tuple[int, ...], seed: int | None
) -> None:
    with opened("hybrid-a", 4, devices=devices, seed=seed) as it:
        segments = [*it.towers.context._programs, *it.towers.denoiser._programs]
        assert len(segments) > 4
        assert {plan.device for plan in segments} == set(devices)
        check_goldens(it.model, golden_cases("hybrid-a"))


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [True, False])
def test_passes_may_use_streams_of_the_library_s_own(opened: Any, graphs: bool) -> None:
    """Engines are built without hidden streams; others may have some, joined before they return."""
    with opened("hybrid-a", 4, graphs=graphs, seed=9) as it:
        it.trt.hidden_streams = True
        check_goldens(it.model, golden_cases("hybrid-a"))


def test_rows_are_independent_and_long_prompts_are_padded_to_few_widths(opened: Any) -> None:
    with opened(seed=7) as it:
        check_rows(it.model, [random_prompt(n) for n in (1, 3, 17, 90, 200)], DIFFUSION)
        made = it.trt.made
        for length in range(65, 75):
            it.model.generate(random_prompt(length), GenerationConfig(max_new_tokens=1))
        assert it.trt.made - made <= 8, "one width, whatever the length"


@pytest.mark.slow
@pytest.mark.parametrize("order", [None, 8])
def test_noise_drawn_beside_a_pass_is_not_the_pass_s(
    built: Any, opened: Any, order: int | None
) -> None:
    """Its own noise is copied to the device as late as may be, when the next step's is there."""
    bundle = built()
    build_engines(bundle, "ort-cpu", builder_for("ort-cpu"))
    hot = replace(DIFFUSION, temperature=1.0, top_k=20, confidence_threshold=1.0)
    requests = [Request([5 + i, 6], replace(hot, seed=i)) for i in range(3)]
    with TwoTower.open(bundle.path, "ort-cpu") as model:
        expected = [out.tokens for out in model.generate(requests)]
    with opened(bundle, seed=order) as it:
        assert [out.tokens for out in it.model.generate(requests)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "kernels"])
def test_a_step_is_one_launch_and_sets_nothing(opened: Any, experts: str) -> None:
    """Copies, programs, kernels and an event in one launch; once warm, nothing is set again."""
    options = GenerationConfig(
        max_new_tokens=64, confidence_threshold=1.0, steps_per_block=16, ignore_eos=True
    )
    marks: list[tuple[int, ...]] = []
    with opened(experts=experts) as it:

        def on_step(record: Any) -> None:
            counts = it.cuda.counts
            made = counts["cudaMalloc"] + counts["cudaHostAlloc"]
            done = it.trt.changes, made, counts["cudaMemcpyAsync"], it.trt.executions
            waits = counts["cudaEventSynchronize"]
            marks.append((*done, len(it.cuda.launched), counts["cudaGraphLaunch"], waits))

        it.model.generate([5, 6, 7], options, on_step=on_step)
        assert len(marks) == 64
        # The third block: both sets of Mamba states have been captured.
        steady = np.diff(np.array(marks[33:48]), axis=0)
        assert (steady == [0, 0, 0, 0, 0, 1, 1]).all(), steady
        assert all(p.replayed for p in it.model._workspaces._idle._denoiser.values())


def test_the_order_of_waits(opened: Any) -> None:
    """A block's first step waits for the context tower, that for its last; the host for steps."""
    with opened(graphs=False) as it:
        it.cuda.calls.clear()  # of loading the weights
        options = replace(DIFFUSION, confidence_threshold=1.0, steps_per_block=2)
        it.model.generate([5, 6, 7], options)
        seen = list(it.cuda.calls)
    record, wait = "cudaEventRecord", "cudaStreamWaitEvent"
    step = [record, "cudaEventSynchronize"]
    block = [wait, wait, *step, *step]
    expected = [*step, *block, wait, wait, record, *block]  # of the prompt first
    assert [call for call in seen if call in expected][: len(expected)] == expected


@pytest.mark.parametrize(
    ("experts", "at", "says"),
    [("dense", 4, r"denoiser.engine was not run"), ("kernels", 5, "was not run")],
)
def test_a_refused_execution_surfaces_and_the_session_goes_on(
    opened: Any, experts: str, at: int, says: str
) -> None:
    case = golden_cases("hybrid-a")[0]
    with opened(graphs=False, experts=experts) as it:
        it.trt.refuse_at = at
        with pytest.raises(DeviceError, match=says):
            check_golden(it.model, case)
        check_golden(it.model, case)


def test_what_a_broken_pass_has_begun_is_waited_for_before_its_memory_goes(opened: Any) -> None:
    with opened("hybrid-a", 4, graphs=False) as it:
        # The last of the prompt's segments: the ones before are on the stream.
        it.trt.refuse_at = len(it.towers.context._programs)
        assert it.trt.refuse_at > 1
        with pytest.raises(DeviceError):
            it.model.generate([5, 6, 7], DIFFUSION)
        refused = it.cuda.calls[it.cuda.calls.index("cudaMemcpyAsync") :]
        assert "cudaStreamSynchronize" in refused[: refused.index("cudaFree")]


def test_an_error_of_ours_leaves_no_stream_in_a_capture(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what a library refuses: any exception between the two ends of a capture."""
    with opened() as it:
        execute = Context.execute_async_v3

        def fail(context: Any, stream: int) -> bool:
            if it.cuda.capturing(stream):
                del context  # or the error's frames would keep it beyond its configuration
                raise RuntimeError("a defect")
            return execute(context, stream)

        monkeypatch.setattr(Context, "execute_async_v3", fail)
        with pytest.raises(RuntimeError, match="a defect"):
            it.model.generate([5, 6, 7], DIFFUSION)
        assert not any(it.cuda.capturing(s) for s in it.cuda._streams)


CAPTURE = ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["capturable", "refuse_capture", "allocates", *CAPTURE])
def test_what_cannot_be_captured_is_launched_instead(
    opened: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened() as it:
        if how in CAPTURE:
            it.cuda.fail[how] = (1, 901)
        else:
            setattr(it.trt, how, how != "capturable")
        for _ in range(3):
            check_golden(it.model, golden_cases("hybrid-a")[0])
        assert "cannot be captured" in caplog.text
        if how == "capturable":  # asked again for every pass, and said once an engine
            assert caplog.text.count("this engine is not stream capturable") == 2
        assert not any(it.cuda.capturing(s) for s in it.cuda._streams), "none stays in a capture"


def test_closing_frees_once_and_twice_is_once(opened: Any) -> None:
    with opened() as it:
        stream = it.model.stream([[5, 6, 7], [8, 9]], DIFFUSION)
        next(stream)
        it.model.generate([[5], [6], [7]], DIFFUSION)
        stream.close()
        it.model.close()
        assert not it.cuda.leaked
        it.model.close()
        it.towers.close()
    assert not it.cuda.leaked


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(0,), (0, 1)])
def test_open_streams_take_turns_with_one_scratch_memory(
    opened: Any, devices: tuple[int, ...]
) -> None:
    with opened() as it:
        alone = [it.model.generate(p, DIFFUSION).tokens for p in ([5, 6, 7], [8, 9])]
    for seed in range(6):
        with opened(seed=seed, devices=devices) as it:
            streams = [it.model.stream(p, DIFFUSION) for p in ([5, 6, 7], [8, 9])]
            texts: list[list[int]] = [[], []]
            for events in zip(*streams, strict=False):
                for text, event in zip(texts, events, strict=True):
                    text.extend(event.tokens)
            assert [tuple(t) for t in texts] == [tuple(a) for a in alone]
