"""What a library refuses while a context is bound is an error with its words."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from tests.helpers.trt.execution import SCRATCH, Context
from twotower import GenerationConfig
from twotower.errors import DeviceError

SHORT = GenerationConfig(max_new_tokens=16, ignore_eos=True)


def error_of(it: Any) -> DeviceError:
    with pytest.raises(DeviceError, match="cannot be bound") as error:
        it.model.generate([5, 6, 7], SHORT)
    return error.value


def test_shapes_that_cannot_be_inferred(opened: Any) -> None:
    """The library raises for what it does not list."""
    with opened() as it:
        it.trt.inference_fails = True
        assert "shapes cannot be inferred: shape inference failed" in error_of(it).found
        it.trt.inference_fails = False
        assert it.model.generate([5, 6, 7], SHORT).tokens


def test_activation_memory_that_is_too_small_for_the_shapes(opened: Any) -> None:
    with opened() as it:
        it.trt.scratch_for_shapes = SCRATCH + 1
        assert f"needs {SCRATCH + 1:,} bytes" in error_of(it).found


def test_ranges_for_a_profiler_are_off(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are built with detailed names, and every enqueue would pay for them."""
    seen: set[str] = set()
    execute = Context.execute_async_v3

    def noted(context: Context, stream: int) -> bool:
        seen.add(context.nvtx_verbosity)
        return execute(context, stream)

    monkeypatch.setattr(Context, "execute_async_v3", noted)
    with opened() as it:
        it.model.generate([5, 6, 7], SHORT)
    assert seen == {"none"}


def test_a_context_goes_before_what_made_it(opened: Any) -> None:
    """With and without an error while it is bound; the fake notes contexts that live too long."""
    with opened("hybrid-a", 4) as it:
        it.trt.scratch_for_shapes = SCRATCH + 1
        error_of(it)
        it.trt.scratch_for_shapes = 0
        it.model.generate([5, 6, 7], SHORT)
        stream = it.model.stream([8, 9], SHORT)
        next(stream)
    gc.collect()
    assert not it.trt.faults


def test_a_second_session_hears_the_library_too(opened: Any) -> None:
    """It has one logger a process: what it says of another session must not be lost.

    Of memory it does not take, it says so and returns nothing: without a look at the log the
    refused execution would be all there is.
    """
    with opened() as first, opened() as second:
        for it in (second, first):
            shared = it.towers.context._shared
            address, size = shared.scratch[0]
            shared.scratch[0] = (address + 8, size)
            assert "cannot be used" in error_of(it).found
