"""Kernels of experts as a part of a build: for which GPUs, when they are refused, and when they are made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.errors import check_error
from tests.helpers.stand_ins import stand_in_bundle
from tests.helpers.tensorrt import L4, install_fake, see_gpu
from tests.helpers.tensorrt_stand_in import StandInBuilder, TensorRTStandIn, stand_in_kernels
from twotower.builders import BuildConfig, build_engines, builder_for, own_code
from twotower.builders.base import silent
from twotower.builders.trt import build_plan
from twotower.bundle import Bundle, engine_folder, load_engine_record
from twotower.errors import BuildError
from twotower.kernels import read_manifest
from twotower.kernels.shape import shape_of

CONFIG: dict[str, Any] = {"sms": (89,), "max_context": 256, "max_batch": 4, "experts": "kernels"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return stand_in_bundle(
        "hybrid-a", tmp_path_factory.mktemp("code") / "bundle", experts="kernels"
    )


@pytest.fixture
def builder() -> StandInBuilder:
    return StandInBuilder(TensorRTStandIn(CudaStandIn()))


def test_layers_and_towers_of_one_shape_share_their_kernels(built: Bundle) -> None:
    record = load_engine_record(built, "rtx")
    steps = [step for steps in record.experts.values() for step in steps]
    assert len(steps) == 6
    (code,) = {step.code for step in steps}
    manifest = read_manifest(engine_folder(built, "rtx") / code)
    assert manifest.shape == shape_of(steps[0])
    assert (manifest.sms, manifest.shape.hidden, manifest.shape.shared_intermediate) == (
        (89,),
        64,
        96,
    )
    assert record.report["experts"][code]["launches"][0] == [8, 4]


def test_engines_fit_until_kernels_or_options_are_others(
    built: Bundle, builder: StandInBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = load_engine_record(built, "rtx")
    assert builder.plan(built, BuildConfig(**CONFIG)).keeps(record)
    assert not builder.plan(built, BuildConfig(**{**CONFIG, "experts": "dense"})).keeps(record)
    assert not builder.plan(built, BuildConfig(**{**CONFIG, "sms": (86, 89)})).keeps(record)
    monkeypatch.setattr(build_plan, "kernel_source", lambda: "of another version")
    assert not builder.plan(built, BuildConfig(**CONFIG)).keeps(record)


def test_a_dry_run_counts_equal_programs(built: Bundle, builder: StandInBuilder) -> None:
    lines = builder.plan(built, BuildConfig(**CONFIG)).describe()
    assert sum(line.startswith("denoiser.") for line in lines) == len(
        {p.file for p in load_engine_record(built, "rtx").engines["denoiser"]}
    )
    assert any("6 layers of experts" in line and "SM 89" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_batch": 17}, "do not take so many rows"),
        ({"sms": (75,)}, "not made for SM 75"),
    ],
)
def test_what_no_kernel_computes_is_refused_before_anything_is_built(
    tmp_path: Path,
    builder: StandInBuilder,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    what: str,
) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "bundle", "float16")
    monkeypatch.setattr(builder, "flavour", replace(builder.flavour, sms=(75, 89)))
    with pytest.raises(BuildError) as error:
        _ = builder.plan(bundle, BuildConfig(**{**CONFIG, **options})).needed_bytes
    check_error(str(error.value), what)
    assert not (bundle.path / "engines" / "rtx").exists()


def test_a_bound_on_memory_is_kept_or_refused(tmp_path: Path, builder: StandInBuilder) -> None:
    """Programs are cut no further: a bound is kept by what is there, or it is refused with one that is."""
    bundle = export_fixture("hybrid-b", tmp_path / "bundle")
    with pytest.raises(BuildError) as error:
        builder.plan(bundle, BuildConfig(**{**CONFIG, "max_build_memory": 10**8})).build(
            tmp_path, report=silent
        )
    check_error(str(error.value), "cannot be built in so little memory")
    assert "--max-build-memory to 0.4G" in error.value.do


@pytest.mark.slow
def test_kernels_for_full_tensorrt_are_those_of_the_gpu_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(tmp_path, monkeypatch)
    see_gpu(monkeypatch, L4)
    builder = builder_for("trt")
    monkeypatch.setattr(builder, "_compiler", stand_in_kernels)
    bundle = export_fixture("hybrid-b", tmp_path / "bundle", "float16")
    record = build_engines(
        bundle, "trt", builder, config=BuildConfig(max_context=256, experts="kernels")
    )
    (code,) = record.report["experts"].values()
    assert code["sms"] == [L4.sm]
    assert [type(step).__name__ for step in record.steps["denoiser"]] == [
        "EngineFile",
        "ExpertsStep",
        "EngineFile",
    ]


def test_another_version_of_a_kernel_is_another_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels" / "device" / "product.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(own_code, "_PACKAGE", tmp_path)
    seen = []
    for text in ("a", "b"):
        file.write_text(text)
        own_code.digest_of.cache_clear()
        seen.append(own_code.kernel_source())
    own_code.digest_of.cache_clear()
    assert seen[0] != seen[1]
