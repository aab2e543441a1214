"""What computes experts where nobody said: kernels where there are such, else a reason in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.helpers.bundles import copy_of, export_fixture
from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.errors import check_error
from tests.helpers.tensorrt import machine_with
from tests.helpers.tensorrt_stand_in import StandInBuilder, TensorRTStandIn, stand_in_job
from twotower import builders
from twotower.builders import BuildConfig, build_engines
from twotower.builders.bundle_graphs import BundleGraphs
from twotower.builders.expert_choice import choose_experts
from twotower.builders.trt import make_engine, tensorrt_builder
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.bundle import BUILD_FILE, Bundle, engine_folder
from twotower.cli.main import main
from twotower.errors import ConfigError
from twotower.hardware import Gpu
from twotower.kernels.tilings import BUILDABLE_SMS

CONFIG = BuildConfig(sms=(89,), max_context=256, max_batch=4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_fixture("hybrid-b", tmp_path_factory.mktemp("choice") / "bundle", "float16")


@pytest.fixture
def bundle(exported: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_of(exported, tmp_path / "bundle"))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> StandInBuilder:
    """Of the target rtx; the command `twotower build` has the same."""
    monkeypatch.setattr(make_engine, "run_job", stand_in_job)
    made = StandInBuilder(TensorRTStandIn(CudaStandIn()))
    made.flavour = replace(made.flavour, sms=(75, 80, 89, 120))
    monkeypatch.setitem(builders.BUILDERS, "rtx", lambda: made)
    return made


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


def without_marks(bundle: Bundle) -> Bundle:
    file = bundle.graph_file("context")
    file.write_bytes(file.read_bytes().replace(b"moe/shares", b"moe/sharez"))
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
    ],
)
def test_kernels_are_taken_where_every_capability_and_row_has_them(
    exported: Bundle, options: dict[str, Any], sms: tuple[int, ...], why: str
) -> None:
    choice = choose_experts(BundleGraphs(exported), replace(CONFIG, **options), sms)
    assert choice.experts == ("dense" if why else "kernels")
    assert why in choice.why
    assert bool(choice.why) == bool(why)


def test_groups_not_tiled_and_old_graphs_are_named(bundle: Bundle, tmp_path: Path) -> None:
    assert choose_experts(BundleGraphs(bundle), CONFIG, (89,)).experts == "kernels"
    few = quantized(Bundle.open(copy_of(bundle, tmp_path / "q")), 8)
    choice = choose_experts(BundleGraphs(few), CONFIG, (89,))
    assert choice.experts == "dense"
    assert "int4 in groups of 8" in choice.why
    assert "the nearest is 16" in choice.why
    other = quantized(Bundle.open(copy_of(bundle, tmp_path / "u")), 32, onnx.TensorProto.UINT8)
    choice = choose_experts(BundleGraphs(other), CONFIG, (89,))
    assert choice.experts == "dense"
    assert "no kernel computes experts stored as uint8" in choice.why
    assert "float8e4m3fn (fp8)" in choice.why
    choice = choose_experts(BundleGraphs(without_marks(bundle)), CONFIG, (89,))
    assert choice.experts == "dense"
    assert "exported by an earlier version" in choice.why


def test_without_experts_there_is_no_reason(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(bundle.config), "indices", lambda *_: ())
    choice = choose_experts(BundleGraphs(bundle), CONFIG, (75,))
    assert (choice.experts, choice.why) == ("dense", "")


def test_what_is_asked_for_is_built(exported: Bundle) -> None:
    assert (
        choose_experts(BundleGraphs(exported), replace(CONFIG, experts="kernels"), ()).experts
        == "kernels"
    )
    choice = choose_experts(BundleGraphs(exported), replace(CONFIG, experts="dense"), ())
    assert choice.to_json()["why"] == "--experts dense asked for it"


def test_a_second_build_keeps_everything_and_another_choice_builds(
    bundle: Bundle,
    builder: StandInBuilder,
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


def test_dense_engines_are_never_built_without_a_word(
    bundle: Bundle,
    builder: StandInBuilder,
    capsys: pytest.CaptureFixture[str],
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
    bundle: Bundle, builder: StandInBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOTOWER_RTX_ANY_SM", "default")
    record = build_engines(bundle, "rtx", builder, config=replace(CONFIG, sms=()))
    assert record.limits is not None and record.limits.sms == ()
    (code,) = record.report["experts"].values()
    assert tuple(code["sms"]) == BUILDABLE_SMS


def test_kernels_are_for_a_gpu_that_engines_are_tried_on(
    bundle: Bundle,
    builder: StandInBuilder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines for SM 80 on Hopper, which they hold no code for: a kernel for SM 80 does not run."""
    config = replace(CONFIG, sms=(80,))
    made = []
    for how in ("", "default"):
        machine = replace(machine_with(Gpu("NVIDIA H100", 90, 80 << 30)), rtx_any_sm=how)
        monkeypatch.setattr(tensorrt_builder, "probe_machine", lambda machine=machine: machine)
        record = build_engines(bundle, "rtx", builder, config=config)
        made += [code["sms"] for code in record.report["experts"].values()]
        assert record.limits is not None and record.limits.sms == (80,)
    assert made == [[80], [80, 90]]


@pytest.mark.parametrize("experts", ["auto", "kernels"])
def test_a_missing_compiler_is_an_error_and_not_a_slow_engine(
    bundle: Bundle, builder: StandInBuilder, monkeypatch: pytest.MonkeyPatch, experts: str
) -> None:
    """Engines with kernels that are there are kept all the same: they need no compiler."""
    config = replace(CONFIG, experts=experts)
    plain = TensorRTBuilder(builder.flavour)
    monkeypatch.setattr("twotower.extras.find_spec", lambda name: None)
    plan = plain.plan(bundle, config)
    for work in (plan.describe, lambda: plan.needed_bytes):
        with pytest.raises(ConfigError) as caught:
            work()
        check_error(str(caught.value), "kernels of experts")
        assert caught.value.found == "not installed: triton"
        assert "twotower[kernels]" in caught.value.do
        assert "--experts dense" in caught.value.do
    with pytest.raises(ConfigError):
        build_engines(bundle, "rtx", plain, config=config)
    assert not (bundle.path / "engines" / "rtx").exists()
    made = build_engines(bundle, "rtx", builder, config=config)
    assert build_engines(bundle, "rtx", plain, config=config) == made
