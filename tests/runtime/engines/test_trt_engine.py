"""The TensorRT runtime on fakes: the references' tokens in any order of the device's work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.helpers.graphs import FIXTURES
from tests.helpers.towers import golden_config
from tests.helpers.trt.execution import Context
from twotower import GenerationConfig, TwoTower
from twotower.builders import build_engines, builder_for
from twotower.errors import DeviceError
from twotower.runtime import Request

DIFFUSION = GenerationConfig(max_new_tokens=40, confidence_threshold=0.5, ignore_eos=True)
AR = GenerationConfig(mode="ar", max_new_tokens=24, ignore_eos=True)
LAYOUTS = {
    "one device": {"devices": (0,)},
    "plain launches": {"devices": (0,), "graphs": False},
    "random order": {"devices": (0,), "seed": 1},
    "two devices": {"devices": (0, 1), "seed": 2},
    "two devices the other way": {"devices": (1, 0)},
}


def golden_cases(folder: str) -> list[dict[str, Any]]:
    cases = json.loads((FIXTURES / folder / "golden.json").read_text())
    return [
        c
        for c in cases
        if c["params"]["block_size"] == 16
        and len(c["prompt"]) + c["params"]["max_new_tokens"] <= 256
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("folder", ["hybrid-a", "hybrid-b"])
def test_the_goldens(
    built: Callable[..., Any], opened: Callable[..., Any], folder: str, layout: str
) -> None:
    cases = golden_cases(folder)
    assert cases
    with opened(built(folder), **LAYOUTS[layout]) as it:
        for case in cases:
            out = it.model.generate(case["prompt"], golden_config(case))
            assert (list(out.tokens), out.usage.nfe) == (case["diffusion_tokens"], case["nfe"])
            assert list(it.model.generate(case["prompt"], AR).tokens) == case["ar_greedy_tokens"]
        together = it.model.generate([Request(c["prompt"], golden_config(c)) for c in cases])
        assert [list(out.tokens) for out in together] == [c["diffusion_tokens"] for c in cases]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "seed"),
    [((0,), None), ((0,), 3), ((0, 1), 4), ((0, 1, 2, 3), None), ((0, 1, 2, 3), 5), ((2, 0, 1), 6)],
)
def test_segments_write_the_same_text_on_any_number_of_devices(
    built: Callable[..., Any],
    opened: Callable[..., Any],
    devices: tuple[int, ...],
    seed: int | None,
) -> None:
    cases = golden_cases("hybrid-a")
    bundle = built("hybrid-a", 4)
    with opened(bundle, devices=devices, seed=seed) as it:
        segments = [
            plan for engine in (it.towers.context, it.towers.denoiser) for plan in engine._programs
        ]
        assert len(segments) > 4
        assert {plan.device for plan in segments} == set(devices)
        for case in cases:
            assert (
                list(it.model.generate(case["prompt"], golden_config(case)).tokens)
                == case["diffusion_tokens"]
            )
            assert list(it.model.generate(case["prompt"], AR).tokens) == case["ar_greedy_tokens"]


@pytest.mark.parametrize("graphs", [True, False])
def test_passes_may_use_streams_of_the_library_s_own(
    built: Callable[..., Any], opened: Callable[..., Any], graphs: bool
) -> None:
    """Engines are built without hidden streams; others may have some, joined before they return."""
    cases = golden_cases("hybrid-a")
    with opened(built("hybrid-a", 4), graphs=graphs, seed=9) as it:
        it.trt.hidden_streams = True
        for case in cases:
            assert (
                list(it.model.generate(case["prompt"], golden_config(case)).tokens)
                == case["diffusion_tokens"]
            )
        together = it.model.generate([Request(c["prompt"], golden_config(c)) for c in cases])
        assert [list(out.tokens) for out in together] == [c["diffusion_tokens"] for c in cases]


def test_rows_are_independent_and_long_prompts_are_padded_to_few_widths(
    built: Callable[..., Any], opened: Callable[..., Any]
) -> None:
    prompts = [np.random.default_rng(n).integers(4, 250, n).tolist() for n in (1, 3, 17, 90, 200)]
    with opened(built(), seed=7) as it:
        alone = [it.model.generate(p, DIFFUSION).tokens for p in prompts]
        assert [out.tokens for out in it.model.generate(prompts, DIFFUSION)] == alone
        made = it.trt.made
        for length in range(65, 75):
            it.model.generate(
                np.random.default_rng(length).integers(4, 250, length).tolist(),
                GenerationConfig(max_new_tokens=1),
            )
        assert it.trt.made - made <= 8, "one width, whatever the length"


@pytest.mark.parametrize("order", [None, 8])
def test_noise_drawn_beside_a_pass_is_not_the_pass_s(
    built: Callable[..., Any],
    opened: Callable[..., Any],
    order: int | None,
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


def test_a_step_is_one_launch_and_sets_nothing(
    built: Callable[..., Any], opened: Callable[..., Any]
) -> None:
    """Two copies, the engine and an event in one launch; once warm, nothing is set again."""
    options = GenerationConfig(
        max_new_tokens=64, confidence_threshold=1.0, steps_per_block=16, ignore_eos=True
    )
    marks: list[tuple[int, ...]] = []
    with opened(built()) as it:

        def on_step(record: Any) -> None:
            changes = it.trt.changes
            counts = it.cuda.counts
            marks.append(
                (
                    changes,
                    counts["cudaMalloc"] + counts["cudaHostAlloc"],
                    counts["cudaGraphLaunch"],
                    counts["cudaMemcpyAsync"],
                    counts["cudaEventSynchronize"],
                    it.trt.executions,
                )
            )

        it.model.generate([5, 6, 7], options, on_step=on_step)
        steady = np.diff(
            np.array(marks[33:48]), axis=0
        )  # the third block: both sets of Mamba states have been captured
        assert len(marks) == 64
        assert (steady == [0, 0, 1, 0, 1, 0]).all(), steady
        assert all(p.replayed for p in it.model._workspaces._idle._denoiser.values())


def test_the_order_of_waits(built: Callable[..., Any], opened: Callable[..., Any]) -> None:
    """A block's first step waits for the context tower, that for its last; the host for steps."""
    with opened(built(), graphs=False) as it:
        it.cuda.calls.clear()  # of loading the weights
        it.model.generate(
            [5, 6, 7],
            GenerationConfig(
                max_new_tokens=32, confidence_threshold=1.0, steps_per_block=2, ignore_eos=True
            ),
        )
        names = {
            "cudaStreamWaitEvent": "wait",
            "cudaEventSynchronize": "host waits",
            "cudaEventRecord": "record",
        }
        seen = [names[c] for c in it.cuda.calls if c in names]
    step = ["record", "host waits"]
    prompt, block = ["record", "host waits"], ["wait", "wait", *step, *step]
    extension = ["wait", "wait", "record"]
    assert seen[: len(prompt + block + extension + block)] == [*prompt, *block, *extension, *block]


def test_a_refused_execution_surfaces_and_the_session_goes_on(
    built: Callable[..., Any], opened: Callable[..., Any]
) -> None:
    case = golden_cases("hybrid-a")[0]
    with opened(built(), graphs=False) as it:
        it.trt.refuse_at = 4
        with pytest.raises(DeviceError, match=r"denoiser.engine was not run"):
            it.model.generate(case["prompt"], golden_config(case))
        assert (
            list(it.model.generate(case["prompt"], golden_config(case)).tokens)
            == case["diffusion_tokens"]
        )


def test_what_a_broken_pass_has_begun_is_waited_for_before_its_memory_goes(
    built: Callable[..., Any], opened: Callable[..., Any]
) -> None:
    with opened(built("hybrid-a", 4), graphs=False) as it:
        segments = len(it.towers.context._programs)
        assert segments > 1
        it.trt.refuse_at = (
            segments  # the last of the prompt's segments: the ones before are on the stream
        )
        with pytest.raises(DeviceError):
            it.model.generate([5, 6, 7], DIFFUSION)
        refused = it.cuda.calls[it.cuda.calls.index("cudaMemcpyAsync") :]
        assert "cudaStreamSynchronize" in refused[: refused.index("cudaFree")]


def test_an_error_of_ours_leaves_no_stream_in_a_capture(
    built: Callable[..., Any], opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only what a library refuses: any exception between the two ends of a capture."""
    with opened(built()) as it:
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


@pytest.mark.parametrize(
    "how",
    [
        "the library says no",
        "refused while captured",
        "the library allocates",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
    ],
)
def test_what_cannot_be_captured_is_launched_instead(
    built: Callable[..., Any],
    opened: Callable[..., Any],
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = golden_cases("hybrid-a")[0]
    with opened(built()) as it:
        if how == "the library says no":
            it.trt.capturable = False
        elif how == "refused while captured":
            it.trt.refuse_capture = True
        elif how == "the library allocates":
            it.trt.allocates = True
        else:
            it.cuda.fail[how] = (1, 901)
        for _ in range(3):
            out = it.model.generate(case["prompt"], golden_config(case))
            assert list(out.tokens) == case["diffusion_tokens"]
        assert "cannot be captured" in caplog.text
        if how == "the library says no":  # asked again for every pass, and said once an engine
            assert caplog.text.count("this engine is not stream capturable") == 2
        assert not any(it.cuda.capturing(s) for s in it.cuda._streams), (
            "no stream stays in a capture"
        )


@pytest.mark.parametrize(
    "call", ["cudaMemcpyAsync", "cudaEventSynchronize", "cudaGraphLaunch", "cudaEventRecord"]
)
def test_a_failing_call_is_named(
    built: Callable[..., Any], opened: Callable[..., Any], call: str
) -> None:
    with opened(built()) as it:
        it.model.generate([5, 6, 7], DIFFUSION)
        it.cuda.fail[call] = (it.cuda.counts[call] + 1, 700)
        with pytest.raises(DeviceError, match=call) as error:
            it.model.generate([5, 6, 7], DIFFUSION)
        assert "700" in error.value.found


def test_closing_frees_once_and_twice_is_once(
    built: Callable[..., Any], opened: Callable[..., Any]
) -> None:
    with opened(built()) as it:
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
    built: Callable[..., Any], opened: Callable[..., Any], devices: tuple[int, ...]
) -> None:
    with opened(built()) as it:
        alone = [it.model.generate(p, DIFFUSION).tokens for p in ([5, 6, 7], [8, 9])]
    for seed in range(6):
        with opened(built(), seed=seed, devices=devices) as it:
            streams = [it.model.stream(p, DIFFUSION) for p in ([5, 6, 7], [8, 9])]
            texts: list[list[int]] = [[], []]
            for events in zip(*streams, strict=False):
                for text, event in zip(texts, events, strict=True):
                    text.extend(event.tokens)
            assert [tuple(t) for t in texts] == [tuple(a) for a in alone]
