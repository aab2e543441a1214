"""Every name of the library that builders use is one the real bindings have, and the fake lacks none of them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.source import ROOT
from tests.helpers.trt.install import install_fake
from twotower.builders.trt.network import BuildLog, explain

USED = {
    "": ("__version__",),
    "ILogger": ("log", "Severity"),
    "Builder": (
        "create_network",
        "create_builder_config",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "OnnxParser": ("parse", "num_errors", "get_error"),
    "INetworkDefinition": ("num_layers", "get_layer"),
    "ILayer": ("type", "num_outputs", "get_output"),
    "IAttentionBoundaryLayer": ("attention",),
    "ITensor": ("dtype",),
    "IBuilderConfig": (
        "clear_flag",
        "profiling_verbosity",
        "add_optimization_profile",
        "progress_monitor",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
    ),
    "IOptimizationProfile": ("set_shape",),
    "ITimingCache": ("serialize",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    "BuilderFlag": ("TF32",),
    "ProfilingVerbosity": ("DETAILED",),
    "LayerType": ("ATTENTION_INPUT",),
    "LayerInformationFormat": ("JSON",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_engine_inspector",),
    "EngineInspector": ("get_engine_information",),
}
"""Class -> what is used of it. `ComputeCapability` and its calls are only in TensorRT for RTX."""

RTX_ONLY = {
    "ComputeCapability": ("SM86",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
}


def lacking(module: Any, used: dict[str, tuple[str, ...]]) -> list[str]:
    out = []
    for kind, attributes in used.items():
        holder = getattr(module, kind, None) if kind else module
        out += [f"{kind}.{a}" for a in attributes if holder is None or not hasattr(holder, a)]
    return out


@pytest.mark.trt_rtx
def test_the_real_bindings_have_every_name() -> None:
    module = importlib.import_module("tensorrt_rtx")
    assert not lacking(module, USED)
    assert not lacking(module, RTX_ONLY)


def test_the_fake_has_them_and_no_name_that_only_rtx_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install_fake(tmp_path, monkeypatch)
    on_instances = {"ILayer.type", "IAttentionBoundaryLayer.attention"}
    on_instances.add("IBuilderConfig.profiling_verbosity")
    assert not set(lacking(module, USED)) - on_instances
    assert len(lacking(module, RTX_ONLY)) == 3


def test_the_list_is_complete() -> None:
    """What is read from the module itself; a new name must be added above, and so to the fake."""
    names = set()
    for file in ("network.py", "engine_inspector.py"):
        text = (ROOT / "builders" / "trt" / file).read_text(encoding="utf-8")
        attributes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        names |= {node.attr for node in attributes if ast.unparse(node.value) == "trt"}
    assert names - {"__name__"} <= USED.keys() | RTX_ONLY.keys()
    assert {"Builder", "OnnxParser", "ComputeCapability"} <= names, "or the walk sees nothing"


def test_no_line_of_the_library_is_lost() -> None:
    log = BuildLog()
    for message in ("odd  thing", "odd thing"):
        log.add("WARNING", message)
    log.add("ERROR", "bad thing")
    log.add("WARNING", "ModelImporter.cpp:1: Make sure input tokens has Int64 binding.")
    lines = log.to_json()
    counts = [(line["message"], line["count"]) for line in lines[:2]]
    assert counts == [("odd thing", 2), ("bad thing", 1)]
    assert [bool(line["explained"]) for line in lines] == [False, False, True]
    assert log.errors() == ["bad thing"]
    assert explain("something nobody has seen") is None
