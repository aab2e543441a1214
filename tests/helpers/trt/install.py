"""Installs the fakes of TensorRT: `import tensorrt`, and bundles with engines."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeBuilder, FakeTensorRT, fake_job
from twotower.builders import BuildConfig, build_engines
from twotower.builders.trt import engine_plan, make_engine, tensorrt_builder
from twotower.bundle import Bundle
from twotower.hardware import Gpu, Machine
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines import OpenOptions
from twotower.runtime.engines.towers import Towers
from twotower.runtime.engines.trt_engine import open_tensorrt
from twotower.tensorrt_library import variant_from_module
from twotower.weights.external import load_graph

__all__ = [
    "GPUS",
    "L4",
    "build_fake_engines",
    "bundle_with_engines",
    "install_fake",
    "machine_with",
    "one_node",
    "open_fake",
    "plant",
    "see_gpu",
]

L4 = Gpu("NVIDIA L4", 89, 24 << 30)
GPUS = tuple(Gpu(f"fake {n}", 89, 1 << 34) for n in range(4))
SOURCE = Path(__file__).with_name("compiler.py")


def install_fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the fake where `import tensorrt` finds it; returns the module."""
    package = folder / "site" / "tensorrt"
    package.mkdir(parents=True)
    shutil.copyfile(SOURCE, package / "__init__.py")
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH")))),
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(
        sys.modules, "tensorrt", None
    )  # what is imported under this name later is forgotten at the end
    del sys.modules["tensorrt"]
    # What the fake acts upon are operators that do not exist: the graph rules would stop them
    # first.
    monkeypatch.setattr(engine_plan, "require_clean", lambda *_, **__: ())
    return importlib.import_module("tensorrt")


def machine_with(*gpus: Gpu, driver: str = "580.1") -> Machine:
    """A machine of these GPUs."""
    return Machine("Linux", 2, 8 << 30, gpus, {}, driver=driver)


def see_gpu(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, driver: str = "580.1") -> None:
    """Lets the builder of this process see GPUs that are not there."""
    monkeypatch.setattr(
        tensorrt_builder, "probe_machine", lambda: machine_with(*gpus, driver=driver)
    )


def plant(bundle: Bundle, graph: str, operator: str) -> None:
    """Makes the first node of a graph another operator, which the fake acts upon."""
    file = bundle.graph_file(graph)
    model: onnx.ModelProto = load_graph(file)
    model.graph.node[0].op_type = operator
    file.write_bytes(model.SerializeToString())


def one_node(folder: Path, operator: str, kind: int) -> Path:
    """A graph of one operator, from `x` to `y` of an element type, both [B,4]."""
    x, y = (onnx.helper.make_tensor_value_info(name, kind, ["B", 4]) for name in "xy")
    node = onnx.helper.make_node(operator, ["x"], ["y"])
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]))
    (folder / "graph.onnx").write_bytes(made.SerializeToString())
    return folder / "graph.onnx"


def bundle_with_engines(
    folder: str | Path, output: Path, pieces: int = 1, *, dtype: str = "float32", **options: Any
) -> Bundle:
    """A bundle with engines for 4 rows.

    Args:
        folder: Name of a fixture, or a checkpoint.
        output: Where it is made.
        pieces: More than 1 cuts each tower into about so many segments.
        dtype: Of the graphs.
        options: Of the build: 256 tokens of text and dense experts if nothing else is said.
    """
    bundle = export_fixture(folder, output, dtype)
    build_fake_engines(bundle, segments=pieces, **options)
    return bundle


def build_fake_engines(bundle: Bundle, **options: Any) -> None:
    """Engines for the fake in a bundle that is there; options as of `bundle_with_engines`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_engine, "run_job", fake_job)
        builder = FakeBuilder(FakeTensorRT(FakeCuda()))
        config = BuildConfig(
            **{"sms": (89,), "max_context": 256, "max_batch": 4, "experts": "dense", **options}
        )
        build_engines(bundle, "rtx", builder, config=config)


def open_fake(bundle: Bundle, trt: FakeTensorRT, **options: Any) -> Towers:
    """A bundle's engines opened with the fake library; options as of `OpenOptions`, with `GPUS`."""
    given = OpenOptions(**{"gpus": GPUS, **options})
    return open_tensorrt(bundle, variant_from_module(trt), Cuda(trt.cuda), given)
