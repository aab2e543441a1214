"""One plan a build: what it asks of the disk, and what makes it another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.trt.install import build_fake_engines
from twotower.builders import BuildConfig, builder_for
from twotower.builders.trt import tensorrt_builder
from twotower.bundle import BUILD_FILE, GRAPH_FILES, Bundle, engine_folder, load_engine_record

GRAPHS = sorted(GRAPH_FILES.values())


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return export_fixture("hybrid-b", tmp_path / "bundle")


@pytest.fixture
def read(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs of the bundle that were read from the disk since it was last cleared."""
    names: list[str] = []
    real = onnx.load

    def load(path: Any, *args: Any, **options: Any) -> onnx.ModelProto:
        relative = Path(path).resolve()
        if relative.is_relative_to(bundle.path.resolve()):
            name = relative.relative_to(bundle.path.resolve()).as_posix()
            names.extend([name] if name in GRAPHS else [])
        return real(path, *args, **options)

    monkeypatch.setattr(onnx, "load", load)
    return names


@pytest.mark.parametrize(
    "options",
    [
        {"experts": "dense"},
        {"experts": "dense", "segments": 2},
        {"experts": "dense", "max_build_memory": 10**9},
        {"experts": "auto"},
        {"experts": "kernels"},
    ],
)
def test_every_graph_is_read_once_and_none_where_all_is_kept(
    bundle: Bundle, read: list[str], options: dict[str, Any]
) -> None:
    build_fake_engines(bundle, **options)
    assert sorted(read) == GRAPHS
    read.clear()
    before = load_engine_record(bundle, "rtx")
    build_fake_engines(bundle, **options)
    assert read == []
    assert load_engine_record(bundle, "rtx") == before


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda"])
def test_so_it_is_for_onnx_runtime(
    bundle: Bundle, read: list[str], tmp_path: Path, target: str
) -> None:
    plan = builder_for(target).plan(bundle, BuildConfig())
    assert plan.describe()
    assert plan.needed_bytes > 0
    folder = tmp_path / "engines"
    folder.mkdir()
    plan.build(folder, report=lambda *_: None)
    assert sorted(read) == GRAPHS


@pytest.mark.parametrize(
    "changed",
    [
        {"max_batch": 2},
        {"max_context": 128},
        {"sms": (86,)},
        {"experts": "kernels"},
        {"segments": 2},
    ],
)
def test_another_wish_is_another_build(bundle: Bundle, changed: dict[str, Any]) -> None:
    build_fake_engines(bundle)
    before = load_engine_record(bundle, "rtx")
    build_fake_engines(bundle, **changed)
    assert load_engine_record(bundle, "rtx").report["asked"] != before.report["asked"]
    assert load_engine_record(bundle, "rtx").to_json() != before.to_json()


def test_other_code_looks_closer_and_keeps_what_it_would_make_again(
    bundle: Bundle, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_fake_engines(bundle)
    file = engine_folder(bundle, "rtx") / BUILD_FILE
    before = file.stat().st_mtime_ns
    read.clear()
    monkeypatch.setattr(tensorrt_builder, "planning_source", lambda: "of another version")
    build_fake_engines(bundle)
    assert sorted(read) == GRAPHS
    assert file.stat().st_mtime_ns == before
    record = json.loads(file.read_text())
    for engine in record["report"]["engines"].values():
        engine["key"] = "of another cut"
    file.write_text(json.dumps(record))
    build_fake_engines(bundle)
    assert "of another cut" not in file.read_text()


def test_options_of_the_cache_decide_nothing(
    bundle: Bundle, read: list[str], tmp_path: Path
) -> None:
    build_fake_engines(bundle)
    read.clear()
    build_fake_engines(bundle, cache=tmp_path / "cache", cache_bytes=10**6, use_cache=False)
    assert read == []
