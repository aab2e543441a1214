"""Graphs without weights are those of an export; engines built from them are found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.bundles import export_fixture
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.graphs import FIXTURES
from tests.helpers.trt.execution import FakeBuilder, FakeTensorRT, fake_job
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.trt import make_engine
from twotower.bundle import GRAPH_FILES, Bundle, EngineRecord
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.cli.main import main as cli
from twotower.config import read_model_config
from twotower.config.model import parse_model_config
from twotower.errors import BuildError, BundleError, ExportError
from twotower.export import ExportConfig, export_programs
from twotower.runtime import TwoTower

CONFIG = FIXTURES / "hybrid-b" / "config.json"


def programs(folder: Path, dtype: str = "float32") -> Bundle:
    return export_programs(read_model_config(CONFIG), folder, ExportConfig(dtype=dtype))


def build(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **options: object) -> EngineRecord:
    monkeypatch.setattr(make_engine, "run_job", fake_job)
    config = BuildConfig(sms=(89,), max_context=256, **options)  # type: ignore[arg-type]
    return build_engines(bundle, "rtx", FakeBuilder(FakeTensorRT(FakeCuda())), config=config)


def test_the_graphs_are_those_of_an_export_to_the_byte(tmp_path: Path) -> None:
    alone, whole = programs(tmp_path / "p"), export_fixture("hybrid-b", tmp_path / "b", "float32")
    for name in GRAPH_FILES:
        assert alone.program_identity(name) == whole.program_identity(name)
        assert alone.weights(name) == whole.weights(name)
    assert not alone.has_weights
    assert not list(alone.path.rglob("*.data"))


def test_engines_built_without_weights_are_taken_from_the_cache_by_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(programs(tmp_path / "p"), monkeypatch, cache=tmp_path / "cache")
    whole = export_fixture("hybrid-b", tmp_path / "b", "float32")
    second = build(whole, monkeypatch, cache=tmp_path / "cache")
    for record, cached in ((first, False), (second, True)):
        assert {e["cached"] for e in record.report["engines"].values()} == {cached}
        assert record.experts["denoiser"], "programs with experts between, as without a word"


def test_the_published_graphs_take_megabytes(tmp_path: Path) -> None:
    bundle = export_programs(parse_model_config(PUBLISHED_CONFIG, "published"), tmp_path / "p")
    assert sum(record.size for record in bundle.files.values()) < 10_000_000
    weights = [ref for name in GRAPH_FILES for ref in bundle.weights(name).values()]
    assert round(sum(ref.nbytes for ref in weights) / 2**30, 1) == 117.7


def test_what_needs_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = programs(tmp_path / "p")
    with pytest.raises(BundleError, match="holds none"):
        build(bundle, monkeypatch, weights="inside")
    with pytest.raises((BundleError, BuildError), match="holds none"):
        build_engines(bundle, "ort-cpu", builder_for("ort-cpu"))
    assert not list(bundle.path.glob("engines/ort-cpu"))
    with pytest.raises(BundleError, match="holds none"):
        TwoTower.open(bundle.path)


def test_a_dry_run_from_a_config_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    words = ["build", str(tmp_path / "p"), "--from-config", str(CONFIG), "--experts", "dense"]
    words += ["--target", "rtx", "--sm", "89", "--max-context", "256"]
    assert cli([*words, "--dtype", "float16", "--dry-run"]) == 0
    assert "as inputs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert cli(["build", str(tmp_path / "p"), "--dtype", "float16"]) == 2
    assert "--from-config" in capsys.readouterr().err


def test_inspect_says_that_such_a_bundle_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(programs(tmp_path / "p"), monkeypatch)
    assert cli(["inspect", str(tmp_path / "p")]) == 0
    assert "the bundle holds no weights" in capsys.readouterr().out


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        programs(tmp_path / "p")
