"""The door to TensorRT, tried with a fake: for the GPU at hand, with timings that are kept, in processes that may die."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import fails
from tests.helpers.trt.install import L4, install_fake, plant, see_gpu
from twotower.builders import BuildConfig, EngineBuilder, build_engines
from twotower.bundle import Bundle, EngineRecord, engine_folder, read_engine_record
from twotower.errors import BuildAbortedError, BuildError, EngineMismatchError
from twotower.hardware import Gpu
from twotower.tensorrt_library import variant_from_module

CONFIG = BuildConfig(max_context=256, experts="dense", max_batch=2)
KEPT = {"graph.onnx", "job.json", "log.json", "README.md"}
B200 = Gpu("NVIDIA B200", 100, 180 << 30)


def build(bundle: Bundle, builder: EngineBuilder, **options: Any) -> EngineRecord:
    return build_engines(bundle, "trt", builder, config=replace(CONFIG, **options))


def timings(bundle: Bundle) -> list[str]:
    return list(json.loads((bundle.path / "engines" / ".trt.timing").read_text()))


def test_the_variant_is_told_by_what_it_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = variant_from_module(install_fake(tmp_path, monkeypatch))
    assert (variant.target, variant.sms) == ("trt", ())
    assert not variant.runtime_cache and not variant.capturable
    assert variant.library == {"name": "tensorrt", "version": "11.4.0.106"}


def test_engines_are_built_for_the_gpu_at_hand(bundle: Bundle, builder: EngineBuilder) -> None:
    record = build(bundle, builder)
    assert record.limits is not None
    assert (record.target, record.limits.sms, record.limits.max_batch) == ("trt", (89,), 2)
    plan = json.loads((engine_folder(bundle, "trt") / "context.engine").read_bytes())
    assert plan["flags"] == [], "TF32 is on by default and must be cleared"
    assert plan["verbosity"] == "DETAILED"
    assert plan["max_aux_streams"] == 0, "a pass runs on the stream it is given and on no other"
    assert [p["tokens"] for p in plan["profiles"]] == [
        [[1, 1], [2, 256], [2, 256]],
        [[1, 16], [2, 16], [2, 16]],
        [[1, 1], [2, 1], [2, 1]],
    ]
    facts = record.report["engines"]["context.engine"]
    assert facts["by_type"]["KV_CACHE_UPDATE"] == 2 * sum(
        kind.value == "*" for kind in bundle.config.layers
    )
    assert facts["layers_from"] == "walk"
    assert "no GPU" in facts["inspector"]["why_not"], "the child sees the true machine"
    library = builder.library()
    assert read_engine_record(bundle, "trt", library=library, sm=89) == record
    with pytest.raises(EngineMismatchError, match="does not fit") as caught:
        read_engine_record(bundle, "trt", library=library, sm=100)
    assert caught.value.found == "built for SM 89, this GPU is SM 100"


@pytest.mark.slow
def test_timings_are_kept_and_used_again(bundle: Bundle, builder: EngineBuilder) -> None:
    build(bundle, builder)
    assert len(timings(bundle)) == 3
    build(bundle, builder, max_context=512, max_batch=8)
    assert len(timings(bundle)) == 6, "the second build started from the first one's"
    (bundle.path / "engines" / ".trt.timing").write_text("garbage")
    build(bundle, builder, force=True)
    assert len(timings(bundle)) == 3, "what the library does not take is replaced"
    assert not list((bundle.path / "engines").glob(".trt.timing.*"))


@pytest.mark.parametrize(
    ("gpus", "sms", "found"), [((), (), "no NVIDIA GPU"), ((L4,), (89,), "--sm was given")]
)
def test_it_builds_for_no_other_machine(
    bundle: Bundle,
    builder: EngineBuilder,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[Gpu, ...],
    sms: tuple[int, ...],
    found: str,
) -> None:
    see_gpu(monkeypatch, *gpus)
    with fails(BuildError, "for the GPU at hand only", found=found, do="rtx"):
        build(bundle, builder, sms=sms)


@pytest.mark.slow
def test_another_gpu_or_driver_builds_again_and_the_first_is_remembered(
    bundle: Bundle, builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(*gpus: Gpu, driver: str = "580.1") -> set[bool]:
        see_gpu(monkeypatch, *gpus, driver=driver)
        record = build(bundle, builder)
        assert record.limits is not None
        assert record.limits.sms == (gpus[0].sm,)
        return {facts["cached"] for facts in record.report["engines"].values()}

    assert cached(L4) == {False}
    assert cached(B200, L4) == {False}, "the first GPU is the one built for"
    assert cached(L4) == {True}
    assert cached(B200) == {True}
    shutil.rmtree(engine_folder(bundle, "trt"))
    assert cached(B200, driver="590.2") == {False}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "what", "found"),
    [
        ("Refuse", "the ONNX parser refuses the graph", "no importer for Refuse"),
        ("RefuseBuild", "cannot build this graph", "no kernel for RefuseBuild"),
        ("Ignore", "ignores an input", "Unused Input: tokens"),
        ("Crash", "the process that built the engine died", "SIGSEGV"),
    ],
)
def test_a_graph_the_library_refuses_is_an_error_and_the_graph_is_kept(
    bundle: Bundle, builder: EngineBuilder, operator: str, what: str, found: str
) -> None:
    build(bundle, builder)
    plant(bundle, "denoiser", operator)
    with pytest.raises(BuildError, match=what) as caught:
        build(bundle, builder, force=True)
    assert type(caught.value) is (BuildAbortedError if operator == "Crash" else BuildError)
    assert found in caught.value.found
    assert "denoiser.engine" in caught.value.found
    folder = bundle.path / "engines" / ".failed" / "trt-denoiser"
    assert str(folder) in caught.value.do
    assert "polygraphy debug reduce" in caught.value.do
    assert {p.name for p in folder.iterdir()} == KEPT
    assert "Its weights are inputs." in (folder / "README.md").read_text()
    assert "denoiser.engine" in {p.name for p in engine_folder(bundle, "trt").iterdir()}, (
        "the old engines are still there"
    )
    plant(bundle, "denoiser", "Identity")
    build(bundle, builder, force=True)
    assert not folder.exists(), "it builds now"


def test_weights_a_refused_graph_holds_are_beside_it(
    bundle: Bundle, builder: EngineBuilder
) -> None:
    plant(bundle, "denoiser", "Refuse")
    with pytest.raises(BuildError, match="refuses the graph"):
        build(bundle, builder, weights="inside")
    folder = bundle.path / "engines" / ".failed" / "trt-denoiser"
    assert {p.name for p in folder.iterdir()} == {*KEPT, "model.onnx.data"}
    data = bundle.path / "denoiser" / "model.onnx.data"
    assert (folder / data.name).samefile(data), "weights are not copied"
    assert data.stat().st_nlink == 1, (
        "nor given a second hard name, with which onnx would refuse to load them"
    )


def test_a_defect_of_ours_is_not_blamed_on_the_graph(
    bundle: Bundle, builder: EngineBuilder
) -> None:
    plant(bundle, "context", "Raise")
    with fails(BuildError, "died", found="RuntimeError: a defect of ours"):
        build(bundle, builder)
    assert not (bundle.path / "engines" / ".failed").exists()
