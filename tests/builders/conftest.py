"""A bundle that a test may damage, and the builder of the fake for TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bundles import copy_of, export_fixture
from tests.helpers.trt.install import L4, install_fake, see_gpu
from twotower.builders import EngineBuilder, builder_for
from twotower.bundle import Bundle


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_fixture("hybrid-b", tmp_path_factory.mktemp("builders") / "b", "float16")


@pytest.fixture(scope="session")
def hybrid_a(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In float32; read only."""
    return export_fixture("hybrid-a", tmp_path_factory.mktemp("builders") / "a", "float32")


@pytest.fixture(scope="session", params=["hybrid-a", "hybrid-b"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Each fixture in float32; read only."""
    return export_fixture(request.param, tmp_path_factory.mktemp("hybrid") / "bundle", "float32")


@pytest.fixture
def bundle(exported: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_of(exported, tmp_path / "bundle"))


@pytest.fixture
def trt_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineBuilder:
    """Of target `trt`, on a machine with one GPU: what is tested with it is not the library."""
    install_fake(tmp_path, monkeypatch)
    see_gpu(monkeypatch, L4)
    return builder_for("trt")


@pytest.fixture
def builder(trt_builder: EngineBuilder) -> EngineBuilder:
    return trt_builder
