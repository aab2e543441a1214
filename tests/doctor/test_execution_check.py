"""An engine against itself: a sound one passes every way.

One that keeps its cache somewhere else, or replays old numbers, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import GPUS, bundle_with_engines
from twotower.doctor.target_checks import check_execution
from twotower.runtime import TwoTower
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines import OpenOptions
from twotower.runtime.engines.trt_engine import open_tensorrt
from twotower.tensorrt_library import flavour_from_module

Plant = Callable[[FakeCuda, FakeTensorRT], None]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bundle_with_engines("hybrid-b", tmp_path_factory.mktemp("execution") / "bundle")


def outcome(bundle: Any, plant: Plant | None = None) -> dict[str, bool | None]:
    @contextmanager
    def open_(**options: Any) -> Iterator[TwoTower]:
        api = FakeCuda(devices=2)
        trt = FakeTensorRT(api)
        if plant:
            plant(api, trt)
        with TwoTower.from_towers(
            open_tensorrt(
                bundle, flavour_from_module(trt), Cuda(api), OpenOptions(gpus=GPUS, **options)
            )
        ) as model:
            yield model

    return {result.name: result.ok for result in check_execution(open_, devices=2)}


COPIED, LAUNCHED, TWO = (
    "keys and values in other memory for every block",
    "passes launched piece by piece",
    "a tower on each of two GPUs",
)


@pytest.mark.slow
def test_a_sound_engine_passes(bundle: Any) -> None:
    assert outcome(bundle) == {COPIED: True, LAUNCHED: True, TWO: True}


@pytest.mark.parametrize(("graph", "found_by"), [("hidden", LAUNCHED), ("", "generation as usual")])
def test_graphs_that_replay_old_numbers_are_found(bundle: Any, graph: str, found_by: str) -> None:
    """The defect of a library that records nothing: a replay leaves outputs as they were.

    Those of the context tower (`hidden`) or of all.
    """

    def plant(api: FakeCuda, trt: FakeTensorRT) -> None:
        recorded = api.cudaStreamEndCapture

        def empty(stream: int) -> tuple[int, int]:
            answer = recorded(stream)
            if trt.log[-1].startswith(f"execute {graph}"):
                api._graphs[answer[1]].clear()
            return answer

        api.cudaStreamEndCapture = empty

    assert outcome(bundle, plant)[found_by] is False


@pytest.mark.slow
def test_a_cache_that_is_kept_elsewhere_is_found(bundle: Any) -> None:
    """The defect of an update that does not reach the buffer the caller bound.

    The library's own copy lasts as long as its context.
    """

    def plant(api: FakeCuda, trt: FakeTensorRT) -> None:
        api.cudaMemcpy2DAsync = lambda *_: (0, None)  # what is moved to other memory is not there

    assert outcome(bundle, plant)[COPIED] is False
