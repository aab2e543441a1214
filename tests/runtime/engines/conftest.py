"""Bundles with engines of the TensorRT stand-in, and sessions on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.tensorrt_stand_in import StandInBuilder, TensorRTStandIn, stand_in_job
from twotower.builders import BuildConfig, build_engines, cut, tensorrt_builder
from twotower.bundle import Bundle
from twotower.flavour import flavour_from_module
from twotower.hardware import Gpu
from twotower.runtime import TwoTower
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.tensorrt_open import TensorRTOptions, open_tensorrt
from twotower.runtime.engines.towers import Towers

GPUS = tuple(Gpu(f"stand-in {n}", 89, 1 << 34) for n in range(4))


@dataclass(frozen=True)
class StandIn:
    """A session with the stand-ins beneath it."""

    model: TwoTower
    towers: Towers
    cuda: CudaStandIn
    trt: TensorRTStandIn


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle of a fixture with stand-in engines for texts of 256 tokens; `pieces` > 1 cuts each tower into about so many segments."""
    made: dict[tuple[str, int], Bundle] = {}

    def build(folder: str = "hybrid-a", pieces: int = 1) -> Bundle:
        if (folder, pieces) not in made:
            bundle = export_fixture(folder, tmp_path_factory.mktemp("stand-in") / f"{folder}-{pieces}", "float32")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tensorrt_builder, "run_job", stand_in_job)
                patch.setattr(cut, "BUILD_MEMORY_BASE", 0)  # tiny weights: the library itself would hide them
                weights = bundle.files["denoiser/model.onnx.data"].size
                memory = None if pieces == 1 else 3 * max(weights // pieces, weights // 4)
                builder = StandInBuilder(TensorRTStandIn(CudaStandIn()))
                build_engines(bundle, "rtx", builder, config=BuildConfig(sms=(89,), max_context=256, max_batch=4, max_build_memory=memory))
            made[folder, pieces] = bundle
        return made[folder, pieces]

    return build


@pytest.fixture
def opened() -> Callable[..., Any]:
    """Opens a bundle on the stand-ins: `opened(bundle, devices=(0,), graphs=True, seed=None)`; on a sound end everything must be freed."""

    @contextmanager
    def open_(bundle: Bundle, *, devices: tuple[int, ...] = (0,), graphs: bool = True, seed: int | None = None) -> Iterator[StandIn]:
        api = CudaStandIn(devices=4, seed=seed)
        trt = TensorRTStandIn(api)
        towers = open_tensorrt(bundle, flavour_from_module(trt), Cuda(api), TensorRTOptions(devices=devices, graphs=graphs, gpus=GPUS))
        with TwoTower.from_towers(towers, trained_block_size=bundle.trained_block_size) as model:
            yield StandIn(model, towers, api, trt)
        assert not api.leaked

    return open_


def folder_of(bundle: Bundle) -> Path:
    return bundle.path / "engines" / "rtx"
