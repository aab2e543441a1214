"""Nothing is compiled while requests wait: engines are warmed up, and kernels are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.goldens import DIFFUSION
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import open_fake
from twotower import GenerationConfig
from twotower.bundle import Bundle, engine_folder
from twotower.errors import ConfigError, RequestError
from twotower.runtime import TwoTower, session
from twotower.runtime.engines import OPENERS

AR = GenerationConfig(mode="ar", max_new_tokens=5, ignore_eos=True)


@pytest.fixture
def open_(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`TwoTower.open` on the fakes, and what is beneath it."""

    @contextmanager
    def opened(
        bundle: Bundle, *, memory: int = 1 << 34, **options: Any
    ) -> Iterator[tuple[TwoTower, FakeTensorRT]]:
        api = FakeCuda(memory=memory)
        trt = FakeTensorRT(api)
        monkeypatch.setitem(OPENERS, "rtx", lambda bundle, _: open_fake(bundle, trt))
        monkeypatch.setattr(session, "select_target", lambda *_, **__: "rtx")
        with TwoTower.open(bundle.path, **options) as model:
            yield model, trt
        assert not api.leaked
        assert not trt.faults

    return opened


def serve(model: TwoTower, most: int = 4) -> None:
    """Batches of every number of rows, short prompts and long ones, both modes."""
    for rows in range(1, most + 1):
        for config in (DIFFUSION, AR):
            for length in (1, 3, 16, 40):
                model.generate([[5] * (length + row) for row in range(rows)], config)


def kept(bundle: Bundle) -> list[str]:
    return sorted(p.name for p in engine_folder(bundle, "rtx").glob(".*.kernels"))


@pytest.mark.slow
def test_nothing_is_compiled_while_requests_wait(copied: Bundle, open_: Any) -> None:
    with open_(copied) as (model, trt):
        before = list(trt.kernels)
        assert before
        serve(model)
        assert trt.kernels == before
        assert [model._workspaces._bound(n) for n in (1, 2, 3)] == [1, 4, 4], "2 is not ready"
        model.warm_up([2])
        before = list(trt.kernels)
        assert model._workspaces._bound(2) == 2
        serve(model)
        assert trt.kernels == before


def test_without_warm_up_they_are_compiled_when_they_first_run(copied: Bundle, open_: Any) -> None:
    with open_(copied, warm_up=()) as (model, trt):
        assert not trt.kernels
        model.generate([[5], [6], [7]], DIFFUSION)
        first = len(trt.kernels)
        assert first
        model.generate([[5], [6]], DIFFUSION)
        assert len(trt.kernels) > first, "two rows are a shape of their own"


@pytest.mark.parametrize("options", [{"warm_up": (4,)}, {"warm_up": ()}])
def test_kernels_are_kept_before_the_session_ends(
    copied: Bundle, open_: Any, options: dict[str, Any]
) -> None:
    """After the warm-up, or the first request: a killed process has kept what it compiled."""
    with open_(copied, **options) as (model, _):
        if not options["warm_up"]:
            assert not kept(copied)
            model.generate([[5], [6], [7]], DIFFUSION)
            model.generate([[5], [6], [7]], AR)
        engines = [".context.engine.", ".context_head.engine.", ".denoiser.engine."]
        assert [name[: len(e)] for name, e in zip(kept(copied), engines, strict=True)] == engines
        shutil.copytree(copied.path, other := copied.path.with_name("other"))
    with open_(Bundle.open(other), warm_up=()) as (model, trt):
        model.generate([[5], [6], [7]], DIFFUSION)
        model.generate([[5], [6], [7]], AR)
        assert not trt.kernels
    assert not list(engine_folder(copied, "rtx").glob(".*partial*"))


def test_a_file_that_is_being_written_is_of_one_process(
    copied: Bundle, open_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that save at a time must not write into one file."""
    names: list[str] = []
    write = Path.write_bytes

    def noted(path: Path, data: bytes) -> int:
        names.append(path.name)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", noted)
    with open_(copied):
        pass
    assert names
    assert all(name.endswith(str(os.getpid())) for name in names)


def test_kernels_are_saved_when_there_are_new_ones_only(
    copied: Bundle, open_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.trt import execution

    count = 0
    serialize = execution._Cache.serialize

    def counted(cache: Any) -> memoryview:
        nonlocal count
        count += 1
        return serialize(cache)

    monkeypatch.setattr(execution._Cache, "serialize", counted)
    with open_(copied) as (model, _):
        model.generate([5], DIFFUSION)
        before = count
        for _ in range(5):
            model.generate([5], DIFFUSION)
        assert count == before


def test_kernels_are_specialised_for_few_numbers_of_rows(opened: Any) -> None:
    with opened() as it:
        head, memory = it.towers.context_head, it.towers.memory
        specs = (*head.signature.inputs, *head.signature.outputs)
        compiled = []
        for rows in (3, 4):
            buffers = memory.small(specs, {"B": rows})
            binding = head.bind(buffers)
            it.trt.kernels.clear()
            binding.run(it.towers.streams.context).wait_done()
            compiled.append(len(it.trt.kernels))
            binding.close()
            memory.release(tuple(buffers.values()))
        assert compiled == [0, 1]


@pytest.mark.slow
def test_text_is_the_same_with_and_without(copied: Bundle, open_: Any) -> None:
    texts = []
    for options in ({"warm_up": ()}, {}, {"warm_up": (1, 2, 4)}):
        with open_(copied, **options) as (model, _):
            results = model.generate([[5, 6, 7], [8, 9], [7] * 30], DIFFUSION)
            texts.append([r.tokens for r in results])
    assert texts[0] == texts[1] == texts[2]


def test_too_many_rows_for_the_memory_are_said_and_passed_over(
    copied: Bundle, open_: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the usual numbers; one that was asked for is an error."""
    with open_(copied) as (model, trt):
        used = trt.cuda._memory - trt.cuda._free(0)
    with open_(copied, warm_up=(4,)) as (model, trt):
        four = trt.cuda._memory - trt.cuda._free(0)
    assert used < four
    memory = (used + four) // 2
    with open_(copied, memory=memory) as (model, trt):
        assert "4 rows are not warmed up" in caplog.text
        before = list(trt.kernels)
        model.generate([5, 6, 7], DIFFUSION)
        assert trt.kernels == before
    with (
        pytest.raises(RequestError, match="not enough memory for 4 row"),
        open_(copied, memory=memory, warm_up=(4,)),
    ):
        raise AssertionError("it was opened")


@pytest.mark.parametrize("rows", [0, 5, -1])
def test_numbers_of_rows_that_are_none(copied: Bundle, open_: Any, rows: int) -> None:
    with (
        pytest.raises(ConfigError, match="cannot be warmed up") as error,
        open_(copied, warm_up=(rows,)),
    ):
        raise AssertionError("it was opened")
    assert "1 to 4" in error.value.found
