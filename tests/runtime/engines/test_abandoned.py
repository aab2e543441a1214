"""Iterators abandoned anywhere: in a thread, in a callback, by the collector in a capture."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from tests.helpers.goldens import check_golden, golden_cases
from tests.helpers.trt.execution import Context
from twotower import GenerationConfig

DIFFUSION = GenerationConfig(max_new_tokens=48, confidence_threshold=0.5, ignore_eos=True)
FREES = ("cudaFree", "cudaFreeHost", "cudaEventDestroy", "cudaGraphExecDestroy")


def freed(it: Any) -> int:
    return sum(it.cuda.counts[name] for name in FREES)


@pytest.mark.parametrize(
    "how", ["closed in another thread", "dropped in another thread", "closed in a callback"]
)
def test_an_iterator_goes_when_the_pass_at_work_is_done(opened: Any, how: str) -> None:
    case = golden_cases("hybrid-a")[0]
    seen: list[int] = []
    with opened() as it:
        streams = [it.model.stream([8, 9], DIFFUSION)]
        next(streams[0])

        let_go = streams.clear if how.startswith("dropped") else streams[0].close

        def on_step(record: Any) -> None:
            if not seen:
                before = freed(it)
                if how.endswith("thread"):
                    thread = threading.Thread(target=let_go)
                    thread.start()
                    thread.join(30)
                    assert not thread.is_alive()
                else:
                    let_go()
                seen.append(freed(it) - before)

        check_golden(it.model, case, on_step=on_step)
        assert seen == [0], "nothing is freed in the middle of another call"
        assert len(it.model._workspaces._working) == 0, "and nothing is kept after it"


def test_the_collector_may_run_inside_a_capture(
    opened: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Freeing memory there would break the capture: `gc` runs where a pass is recorded."""
    execute = Context.execute_async_v3
    collected: list[bool] = []
    kept: list[weakref.ref[Any]] = []

    def collecting(context: Context, stream: int) -> bool:
        if it.cuda.capturing(stream) and kept and kept[0]() is not None:
            gc.collect()
            collected.append(kept[0]() is None)
        return execute(context, stream)

    monkeypatch.setattr(Context, "execute_async_v3", collecting)
    with opened() as it:
        gc.disable()
        try:
            stream = it.model.stream([8, 9], DIFFUSION)
            next(stream)
            kept.append(weakref.ref(stream))
            cycle: list[Any] = [stream]
            cycle.append(cycle)
            del stream, cycle
            it.model.generate([5, 6, 7], DIFFUSION)
        finally:
            gc.enable()
        assert collected == [True]
    assert "cannot be captured" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(1,), (1, 0)])
def test_threads_take_turns(opened: Any, devices: tuple[int, ...]) -> None:
    """Calls and iterators of several threads, some abandoned: each text is what it is alone."""
    prompts = [[5, 6, 7], [8, 9], [7] * 20]
    with opened() as it:
        alone = [it.model.generate(p, DIFFUSION).tokens for p in prompts]
    texts: dict[tuple[int, int], tuple[int, ...]] = {}
    failed: list[BaseException] = []
    with opened(devices=devices, seed=5) as it:

        def work(number: int) -> None:
            try:
                for turn in range(3):
                    prompt = prompts[(number + turn) % 3]
                    abandoned = it.model.stream(prompt, DIFFUSION)
                    next(abandoned)
                    if number == 0:
                        texts[number, turn] = it.model.generate(prompt, DIFFUSION).tokens
                    else:
                        events = it.model.stream(prompt, DIFFUSION)
                        texts[number, turn] = tuple(t for event in events for t in event.tokens)
            except BaseException as e:  # noqa: BLE001 - a thread's error is this test's
                failed.append(e)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert texts == {(n, turn): alone[(n + turn) % 3] for n in range(3) for turn in range(3)}
