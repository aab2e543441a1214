"""Bundles with engines of the fake TensorRT, and sessions on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.once import made_once
from tests.helpers.trt.execution import FakeTensorRT
from tests.helpers.trt.install import GPUS, bundle_with_engines, open_fake
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.bundle import Bundle
from twotower.hardware import probe_machine
from twotower.runtime import TwoTower
from twotower.runtime.engines.towers import Towers
from twotower.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Session:
    """A session with the fakes beneath it."""

    model: TwoTower
    towers: Towers
    cuda: FakeCuda
    trt: FakeTensorRT


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle with fake engines; `pieces` > 1 cuts each tower into about so many.

    With `experts="kernels"` it is cut at every layer of experts.
    """
    made: dict[tuple[str, int, str, str], Bundle] = {}

    def build(
        folder: str | Path = "hybrid-a",
        pieces: int = 1,
        *,
        dtype: str = "float32",
        experts: str = "dense",
    ) -> Bundle:
        key = (str(folder), pieces, dtype, experts)
        if key not in made:
            target = tmp_path_factory.mktemp("fake") / "bundle"
            made[key] = bundle_with_engines(folder, target, pieces, dtype=dtype, experts=experts)
        return made[key]

    return build


@pytest.fixture
def opened(built: Callable[..., Bundle]) -> Callable[..., Any]:
    """Opens a bundle, or what `built` makes, on the fakes; on a sound end everything is freed."""

    @contextmanager
    def open_(
        bundle: Bundle | str | Path = "hybrid-a",
        pieces: int = 1,
        *,
        dtype: str = "float32",
        experts: str = "dense",
        devices: tuple[int, ...] = (0,),
        graphs: bool = True,
        seed: int | None = None,
        max_batch: int = 8,
    ) -> Iterator[Session]:
        if not isinstance(bundle, Bundle):
            bundle = built(bundle, pieces, dtype=dtype, experts=experts)
        api = FakeCuda(devices=4, seed=seed, sm=GPUS[0].sm)
        trt = FakeTensorRT(api)
        towers = open_fake(bundle, trt, devices=devices, graphs=graphs)
        tokenizer = Tokenizer.from_file(bundle.tokenizer_file) if bundle.tokenizer_file else None
        trained = bundle.trained_block_size
        with TwoTower.from_towers(
            towers, tokenizer=tokenizer, trained_block_size=trained, max_batch=max_batch
        ) as model:
            yield Session(model, towers, api, trt)
        assert not api.leaked
        assert not api.loaded, "libraries of kernels"
        assert not trt.faults

    return open_


@pytest.fixture
def copied(built: Callable[..., Bundle], tmp_path: Path) -> Bundle:
    """A bundle with engines and without compiled kernels that a test may damage."""
    shutil.copytree(built().path, tmp_path / "bundle", ignore=shutil.ignore_patterns(".*.kernels"))
    return Bundle.open(tmp_path / "bundle")


@pytest.fixture(scope="session")
def really_built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Engines of the real library, on a machine without a driver. Read only."""
    if probe_machine().gpus:
        pytest.skip("there is a GPU here")

    def make(folder: Path) -> None:
        bundle = export_fixture("hybrid-b", folder / "bundle", "float16")
        config = BuildConfig(sms=(89,), max_context=256, experts="dense")
        build_engines(bundle, "rtx", builder_for("rtx"), config=config)

    return Bundle.open(made_once(tmp_path_factory, "really-built", make) / "bundle")
