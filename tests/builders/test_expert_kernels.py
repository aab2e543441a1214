"""What computes a build's experts: kernels where there are such, else a stated reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.bundles import copy_of
from tests.helpers.errors import fails
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.trt.execution import FakeBuilder, FakeTensorRT, fake_job, fake_kernels
from tests.helpers.trt.install import L4, bundle_with_engines, machine_with
from twotower import builders
from twotower.builders import BuildConfig, EngineBuilder, build_engines, cache
from twotower.builders.base import silent
from twotower.builders.expert_cut import experts_of
from twotower.builders.expert_kernels import ExpertChoice, choose_path
from twotower.builders.segment import BundleGraphs
from twotower.builders.trt import build_plan, make_engine, tensorrt_builder
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.bundle import BUILD_FILE, Bundle, engine_folder, load_engine_record
from twotower.cli.main import main
from twotower.errors import BuildError, ConfigError
from twotower.hardware import Gpu
from twotower.kernels import read_manifest
from twotower.kernels.shape import shape_of
from twotower.kernels.tilings import BUILDABLE_SMS

CONFIG = BuildConfig(sms=(89,), max_context=256, max_batch=4)
KERNELS = replace(CONFIG, experts="kernels")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_with_engines(
        "hybrid-a", tmp_path_factory.mktemp("code") / "bundle", experts="kernels"
    )


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    """Of the target rtx; the command `twotower build` has the same."""
    monkeypatch.setattr(make_engine, "run_job", fake_job)
    made = FakeBuilder(FakeTensorRT(FakeCuda()))
    made.variant = replace(made.variant, sms=(75, 80, 86, 89, 120))
    monkeypatch.setitem(builders.BUILDERS, "rtx", lambda: made)
    return made


def choice_for(
    bundle: Bundle, sms: tuple[int, ...] = (89,), config: BuildConfig = CONFIG
) -> ExpertChoice:
    return choose_path(bundle, config, sms, experts_of(BundleGraphs(bundle)))


def quantized(bundle: Bundle, group: int, dtype: int = onnx.TensorProto.INT4) -> Bundle:
    """As if one layer's experts had groups of so many: the graph alone is read."""
    file = bundle.graph_file("denoiser")
    model = onnx.load(str(file), load_external_data=False)
    matrix = ".mixer.experts.up_proj.weight"
    weight = next(t for t in model.graph.initializer if t.name.endswith(matrix))
    scale = model.graph.initializer.add()
    scale.CopyFrom(weight)
    scale.name = f"{weight.name}.scale"
    scale.dims[-1] = weight.dims[-1] // group
    weight.data_type = dtype
    file.write_bytes(model.SerializeToString())
    return bundle


@pytest.mark.parametrize(
    ("options", "sms", "why"),
    [
        ({}, (89,), ""),
        ({"max_batch": 16}, (80, 86, 89, 90, 100, 120, 121), ""),
        ({}, (75, 89), "not made for SM 75"),
        ({}, (103,), "not made for SM 103"),
        ({"max_batch": 17}, (89,), "at most 4096"),
        ({"segments": 2}, (89,), "--segments 2"),
        ({"experts": "dense"}, (), "--experts dense asked for it"),
        ({"experts": "kernels"}, (), ""),
    ],
)
def test_kernels_are_taken_where_every_capability_and_row_has_them(
    exported: Bundle, options: dict[str, Any], sms: tuple[int, ...], why: str
) -> None:
    choice = choice_for(exported, sms, replace(CONFIG, **options))
    assert choice.experts == ("dense" if why else "kernels")
    assert why in choice.why
    assert bool(choice.why) == bool(why)


def test_groups_not_tiled_and_old_graphs_are_named(bundle: Bundle, tmp_path: Path) -> None:
    low_bit = quantized(Bundle.open(copy_of(bundle, tmp_path / "q")), 8)
    unknown = quantized(Bundle.open(copy_of(bundle, tmp_path / "u")), 32, onnx.TensorProto.UINT8)
    file = bundle.graph_file("context")
    file.write_bytes(file.read_bytes().replace(b"moe/shares", b"moe/sharez"))
    for damaged, words in (
        (low_bit, ("int4 in groups of 8", "the nearest is 16")),
        (unknown, ("no kernel computes experts stored as uint8", "float8e4m3fn (fp8)")),
        (bundle, ("exported by an earlier version",)),
    ):
        choice = choice_for(damaged)
        assert choice.experts == "dense"
        assert all(word in choice.why for word in words)


def test_without_experts_there_is_no_reason(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bundle.config), "indices", lambda *_: ())
    assert choice_for(bundle, (75,)) == ExpertChoice("dense", "")


@pytest.mark.parametrize("options", [{"experts": "sparse"}, {"experts": "kernels", "segments": 2}])
def test_options_that_do_not_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BuildConfig(**options)


def test_a_second_build_keeps_everything_and_another_choice_builds(
    bundle: Bundle, builder: FakeBuilder
) -> None:
    file = engine_folder(bundle, "rtx") / BUILD_FILE

    def stamp(**options: Any) -> int:
        build_engines(bundle, "rtx", builder, config=replace(CONFIG, **options))
        return file.stat().st_ino

    first = stamp()
    assert stamp() == first
    assert stamp(experts="kernels") == first, "what `auto` came to"
    dense = stamp(experts="dense")
    assert dense != first
    assert stamp(experts="dense") == dense
    again = stamp()
    assert again != dense
    assert stamp() == again
    without = stamp(sms=(75, 89))
    assert without != again
    assert stamp(sms=(75, 89)) == without


def test_engines_fit_until_kernels_are_others(
    built: Bundle, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = load_engine_record(built, "rtx")
    assert builder.plan(built, KERNELS).keeps(record)
    assert not builder.plan(built, replace(KERNELS, sms=(86, 89))).keeps(record)
    monkeypatch.setattr(build_plan, "kernel_source", lambda: "of another version")
    assert not builder.plan(built, KERNELS).keeps(record)


def test_the_reason_for_dense_engines_is_always_shown(
    bundle: Bundle, builder: FakeBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says it, each time; so do a dry run, build.json and `inspect`."""
    words = ["build", str(bundle.path), "--target", "rtx", "--sm", "75,89", "--max-context", "256"]
    assert main([*words, "--dry-run"]) == 0
    assert "dense: the expert kernels are not made for SM 75" in capsys.readouterr().out
    for _ in range(2):
        assert main(words) == 0
        said = capsys.readouterr().err
        assert "note: experts are dense: the expert kernels are not made for SM 75" in said
        assert "about 10 times as long" in said
    assert main(["inspect", str(bundle.path)]) == 0
    assert "experts are dense: the expert kernels are not made for SM 75" in capsys.readouterr().out
    report = json.loads((engine_folder(bundle, "rtx") / BUILD_FILE).read_text())["report"]
    assert report["choice_of_experts"].keys() == {"computed_by", "why", "cost"}
    for more in (["--experts", "dense"], ["--sm", "89"]):
        assert main([*words, *more]) == 0
        assert "note:" not in capsys.readouterr().err
    assert main(["inspect", str(bundle.path)]) == 0
    assert "experts are dense" not in capsys.readouterr().out


def test_a_library_that_chooses_its_gpus_gets_kernels_for_all(
    bundle: Bundle, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOTOWER_RTX_ANY_SM", "default")
    record = build_engines(bundle, "rtx", builder, config=replace(CONFIG, sms=()))
    assert record.limits is not None and record.limits.sms == ()
    (code,) = record.report["experts"].values()
    assert tuple(code["sms"]) == BUILDABLE_SMS


def test_kernels_are_for_a_gpu_that_engines_are_tried_on(
    bundle: Bundle, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines for SM 80 on Hopper, which they hold no code for: a kernel for SM 80 does not run."""
    made = []
    for how in ("", "default"):
        machine = replace(machine_with(Gpu("NVIDIA H100", 90, 80 << 30)), rtx_any_sm=how)
        monkeypatch.setattr(tensorrt_builder, "probe_machine", lambda machine=machine: machine)
        record = build_engines(bundle, "rtx", builder, config=replace(CONFIG, sms=(80,)))
        made += [code["sms"] for code in record.report["experts"].values()]
        assert record.limits is not None and record.limits.sms == (80,)
    assert made == [[80], [80, 90]]


@pytest.mark.slow
def test_kernels_for_full_tensorrt_are_those_of_the_gpu_at_hand(
    bundle: Bundle, trt_builder: EngineBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_builder, "_compiler", fake_kernels)
    record = build_engines(bundle, "trt", trt_builder, config=replace(KERNELS, sms=()))
    (code,) = record.report["experts"].values()
    assert code["sms"] == [L4.sm]
    kinds = [type(step).__name__ for step in record.steps["denoiser"]]
    assert kinds == ["EngineFile", "ExpertsStep", "EngineFile"]


@pytest.mark.parametrize("experts", ["auto", "kernels"])
def test_a_missing_compiler_is_an_error_and_not_a_slow_engine(
    bundle: Bundle, builder: FakeBuilder, monkeypatch: pytest.MonkeyPatch, experts: str
) -> None:
    """Engines with kernels that are there are kept all the same: they need no compiler."""
    config = replace(CONFIG, experts=experts)
    plain = TensorRTBuilder(builder.variant)
    monkeypatch.setattr("twotower.extras.find_spec", lambda name: None)
    plan = plain.plan(bundle, config)
    said: Any = {"found": "not installed: triton", "do": ("twotower[kernels]", "--experts dense")}
    for work in (plan.describe, lambda: plan.needed_bytes):
        with fails(ConfigError, what="kernels of experts", **said):
            work()
    with pytest.raises(ConfigError):
        build_engines(bundle, "rtx", plain, config=config)
    assert not (bundle.path / "engines" / "rtx").exists()
    made = build_engines(bundle, "rtx", builder, config=config)
    assert build_engines(bundle, "rtx", plain, config=config) == made


def test_layers_and_towers_of_one_shape_share_their_kernels(built: Bundle) -> None:
    record = load_engine_record(built, "rtx")
    steps = [step for steps in record.experts.values() for step in steps]
    assert len(steps) == 6
    (code,) = {step.code for step in steps}
    manifest = read_manifest(engine_folder(built, "rtx") / code)
    shape = manifest.shape
    assert shape == shape_of(steps[0])
    assert (manifest.sms, shape.hidden, shape.shared_intermediate) == ((89,), 64, 96)
    assert record.report["experts"][code]["launches"][0] == [8, 4]


def test_a_dry_run_counts_equal_programs(built: Bundle, builder: FakeBuilder) -> None:
    lines = builder.plan(built, KERNELS).describe()
    files = {p.file for p in load_engine_record(built, "rtx").engines["denoiser"]}
    assert sum(line.startswith("denoiser.") for line in lines) == len(files)
    assert any("6 layers of experts" in line and "SM 89" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"max_batch": 17}, "do not take so many rows"), ({"sms": (75,)}, "not made for SM 75")],
)
def test_what_no_kernel_computes_is_refused_before_anything_is_built(
    exported: Bundle, builder: FakeBuilder, options: dict[str, Any], what: str
) -> None:
    with fails(BuildError, what):
        _ = builder.plan(exported, replace(KERNELS, **options)).needed_bytes


def test_a_bound_on_memory_is_kept_or_refused(
    exported: Bundle, tmp_path: Path, builder: FakeBuilder
) -> None:
    """Programs are cut no further; the error names a bound that can be kept."""
    little, bound = "cannot be built in so little memory", "--max-build-memory to 0.4G"
    with fails(BuildError, what=little, do=bound):
        plan = builder.plan(exported, replace(KERNELS, max_build_memory=10**8))
        plan.build(tmp_path, report=silent)


def test_another_version_of_a_kernel_is_another_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels" / "device" / "product.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(cache, "_PACKAGE", tmp_path)
    seen = []
    for text in ("a", "b"):
        file.write_text(text)
        cache._digest_of.cache_clear()
        seen.append(cache.kernel_source())
    cache._digest_of.cache_clear()
    assert seen[0] != seen[1]
