"""Towers for ONNX Runtime on a GPU cut at their experts: what is written, kept and refused."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.errors import check_error
from tests.helpers.trt.execution import fake_kernels
from twotower.builders import BuildConfig, build_engines, builder_for, expert_kernels
from twotower.builders.ort import cuda
from twotower.builders.ort.cuda import OrtBuilder, OrtCudaPlan, kernel_limits
from twotower.bundle import (
    BUILD_FILE,
    Bundle,
    EngineFile,
    EngineRecord,
    engine_folder,
    load_engine_record,
)
from twotower.cli.main import main
from twotower.errors import ConfigError
from twotower.hardware import Gpu
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.spec import (
    CONTEXT,
    CONTEXT_HEAD,
    DENOISER,
    EXPERTS_IN,
    EXPERTS_OUT,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    SHARES,
)
from twotower.weights.external import load_graph, located_weights

KERNELS = BuildConfig(experts="kernels", sms=(90,))


def built(bundle: Bundle, config: BuildConfig = KERNELS) -> EngineRecord:
    builder = OrtBuilder(
        builder_for("ort-cuda").library(), partial(OrtCudaPlan, compiler=fake_kernels)
    )
    return build_engines(bundle, "ort-cuda", builder, config=config)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = export_fixture("hybrid-a", tmp_path_factory.mktemp("programs") / "bundle", "bfloat16")
    built(bundle)
    return bundle


def test_the_list_of_steps(bundle: Bundle) -> None:
    """Programs and experts in turns, handing over what the cut says, as build.json has it."""
    record = load_engine_record(bundle, "ort-cuda")
    for graph in (CONTEXT, DENOISER):
        steps = record.steps[graph]
        kinds = [isinstance(step, EngineFile) for step in steps]
        assert kinds == [True, False] * bundle.config.pattern.count("E") + [True]
        programs = record.engines[graph]
        for before, after in pairwise(programs):
            assert {EXPERTS_IN, SHARES, RESIDUAL_OUT} <= {spec.name for spec in before.outputs}
            assert {EXPERTS_OUT, RESIDUAL_IN} <= {spec.name for spec in after.inputs}
    assert len(record.steps[CONTEXT_HEAD]) == 1
    assert record.report["choice_of_experts"] == {"computed_by": "kernels"}
    assert (record.limits.max_batch, record.limits.sms) == (8, (90,)) if record.limits else False


def test_a_program_is_a_graph_that_says_what_the_record_says(bundle: Bundle) -> None:
    """Weights are read from the bundle: of experts by no program, every other by one.

    But for shifts and gates, which are read before a layer's experts and after them.
    """
    record = load_engine_record(bundle, "ort-cuda")
    for graph in (CONTEXT, DENOISER):
        table, read = bundle.weights(graph), []
        for part in record.engines[graph]:
            model = load_graph(engine_folder(bundle, "ort-cuda") / part.file)
            places = located_weights(model)
            assert tuple(places) == part.constants
            for said, held in (
                (part.inputs, model.graph.input),
                (part.outputs, model.graph.output),
            ):
                assert [spec.name for spec in said] == [value.name for value in held]
            for name, (location, ref) in places.items():
                assert (location, ref) == (f"{graph}/model.onnx.data", table[name])
            read += places
        experts = {w.name for step in record.experts[graph] for w in step.weights.values()}
        assert {*read, *experts} == set(table)
        assert experts.isdisjoint(read)
        twice = {name for name, count in Counter(read).items() if count > 1}
        assert all(name.startswith("scale_shift_tables.") for name in twice), twice
    assert record.holds == {}


def test_what_fits_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export_fixture("hybrid-b", tmp_path / "b", "float16")
    stamp = engine_folder(bundle, "ort-cuda") / BUILD_FILE
    built(bundle)
    first = stamp.stat().st_mtime_ns
    built(bundle)
    assert stamp.stat().st_mtime_ns == first
    more = BuildConfig(experts="kernels", sms=(80, 90))
    fewer = BuildConfig(experts="kernels", sms=(80, 90), max_batch=4)
    for other in (more, fewer):
        before = stamp.stat().st_mtime_ns
        built(bundle, other)
        assert stamp.stat().st_mtime_ns > before
    before = stamp.stat().st_mtime_ns
    monkeypatch.setattr("twotower.builders.ort.cuda.kernel_source", lambda: "of another version")
    built(bundle, fewer)
    assert stamp.stat().st_mtime_ns > before, "kernels are made from this version's"


@pytest.mark.parametrize(
    ("gpus", "sms"),
    [((90,), (90,)), ((89, 80, 89), (80, 89)), ((75,), BUILDABLE_SMS), ((), BUILDABLE_SMS)],
)
def test_kernels_are_for_the_gpus_at_hand(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, gpus: tuple[int, ...], sms: tuple[int, ...]
) -> None:
    here = SimpleNamespace(gpus=tuple(Gpu(f"GPU {n}", sm, 1 << 34) for n, sm in enumerate(gpus)))
    monkeypatch.setattr(cuda, "probe_machine", lambda: here)
    assert kernel_limits(bundle, BuildConfig(experts="kernels")).sms == sms
    assert kernel_limits(bundle, BuildConfig(experts="kernels", sms=(86,))).sms == (86,)


def test_inspect_tells_programs_and_kernels(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bundle.path)]) == 0
    out = capsys.readouterr().out
    assert "SM 90; up to 8 rows" in out
    assert "  denoiser: 4 programs and 3 layers of experts between them" in out
    assert "kernels for SM 90, up to 4096 tokens" in out


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--sm", "75"], "not made for SM 75"),
        (["--sm", "90", "--max-batch", "17"], "do not take so many rows"),
    ],
)
def test_what_no_kernel_takes(
    bundle: Bundle, options: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = engine_folder(bundle, "ort-cuda") / BUILD_FILE
    stamp = file.stat().st_mtime_ns
    words = ["build", str(bundle.path), "--target", "ort-cuda", "--experts", "kernels"]
    assert main([*words, *options]) == 2
    check_error(capsys.readouterr().err, what)
    assert file.stat().st_mtime_ns == stamp


def test_a_missing_compiler_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export_fixture("hybrid-a", tmp_path / "b")

    def missing(*names: Any, **about: Any) -> None:
        raise ConfigError("compiling needs triton", found="it is not installed", do="install it")

    monkeypatch.setattr(expert_kernels, "require_libraries", missing)
    with pytest.raises(ConfigError, match="triton"):
        build_engines(bundle, "ort-cuda", builder_for("ort-cuda"), config=KERNELS)
    assert not engine_folder(bundle, "ort-cuda").exists()
