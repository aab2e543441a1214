"""The stand-in for TensorRT under its own name, in this process and in those it starts, and bundles with planted operators."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.graphs import FIXTURES
from twotower.builders.trt import build_plan, tensorrt_builder
from twotower.bundle import Bundle
from twotower.hardware import Gpu, Machine
from twotower.weights.external import load_graph

__all__ = ["L4", "install_fake", "machine_with", "plant", "see_gpu"]

L4 = Gpu("NVIDIA L4", 89, 24 << 30)
SOURCE = FIXTURES.parents[0] / "helpers" / "fake_tensorrt.py"


def install_fake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the stand-in where `import tensorrt` finds it; returns the module."""
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
    # What the stand-in acts upon are operators that do not exist: the graph rules would stop them
    # first.
    monkeypatch.setattr(build_plan, "require_clean", lambda *_, **__: ())
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
    """Makes the first node of a graph another operator, which the stand-in acts upon."""
    file = bundle.graph_file(graph)
    model: onnx.ModelProto = load_graph(file)
    model.graph.node[0].op_type = operator
    file.write_bytes(model.SerializeToString())
