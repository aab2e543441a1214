"""Every graph is parsed and built by TensorRT for RTX, without a GPU, for three generations; of the trained model in every dtype."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import fails
from tests.helpers.source import CHECKPOINTS
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.bundle import (
    Bundle,
    EngineRecord,
    engine_folder,
    load_engine_record,
    read_engine_record,
)
from twotower.errors import BuildError, ConfigError
from twotower.export import Checkpoint, ExportConfig, export_bundle
from twotower.hardware import RTX_SMS

pytestmark = [pytest.mark.trt_rtx, pytest.mark.slow]
SMS = (86, 89, 120)
# of one layer, in any element type; what layers share counts for the first of them
MOST_KERNELS = {
    "prefill": {"mamba": 20, "moe": 11, "attention": 18, "mlp": 4},
    "block": {"mamba": 14, "moe": 10, "attention": 17, "mlp": 3},
    "decode": {"mamba": 11, "moe": 11, "attention": 8, "mlp": 4},
    "denoise": {
        "mamba": 9,
        "moe": 10,
        "attention": 15,
        "mlp": 3,
        "conditioning": 9,
        "sampler": 7,
        "lm_head": 1,
    },
    "head": {"graph": 4},
}
MORE_FOR_SUMS = 3
"""Kernels of a router whose product is a sum, where SM 75 is among the compute capabilities."""


def exported(folder: Path, name: str, dtype: str) -> Bundle:
    path = folder / f"{name}-{dtype}"
    if not path.exists():
        checkpoint = Checkpoint.open(CHECKPOINTS[name])
        export_bundle(checkpoint, path, ExportConfig(dtype=dtype))
    return Bundle.open(path)


def build(bundle: Bundle, **options: Any) -> EngineRecord:
    config = {"sms": SMS, "max_context": 256, "experts": "dense", **options}
    return build_engines(bundle, "rtx", builder_for("rtx"), config=BuildConfig(**config))


def twotower(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twotower.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rtx")


def programs_of(record: EngineRecord) -> list[Any]:
    return [p for e in record.report["engines"].values() for p in e["inspector"]["programs"]]


def unexplained(record: Any) -> list[str]:
    lines = [line for engine in record.report["engines"].values() for line in engine["log"]]
    return [line["message"] for line in lines if not line["explained"]]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("a", "float16"), ("b", "float16")]
    + [("tiny", dtype) for dtype in ("float16", "bfloat16", "float32")],
)
def test_the_graphs_build_without_an_unexplained_word(folder: Path, name: str, dtype: str) -> None:
    bundle = exported(folder, name, dtype)
    record = build(bundle)
    assert not unexplained(record)
    assert record.limits is not None
    assert (record.limits.sms, record.limits.capacity) == (SMS, 512)
    files = [e.file for parts in record.engines.values() for e in parts]
    assert files == ["context.engine", "context_head.engine", "denoiser.engine"]
    layers = record.report["engines"]["context.engine"]["by_type"]
    attention = sum(kind.value == "*" for kind in bundle.config.layers)
    assert layers["KV_CACHE_UPDATE"] == 2 * attention, "keys and values are updated in place"
    assert not [kind for kind in layers if "PLUGIN" in kind]
    assert not {"NON_ZERO", "CUMULATIVE", "TRIP_LIMIT"} & layers.keys()
    assert read_engine_record(bundle, "rtx", library=builder_for("rtx").library()) == record, (
        "build.json holds all of it"
    )
    check_programs(bundle, record)
    for file in record.files:  # the compiled program is in the plan, as text
        program = (engine_folder(bundle, "rtx") / file).read_bytes()
        streams = set(re.findall(rb"n_streams = (\d+)", program))
        assert streams == {b"1"}, f"{file} runs on streams of its own"
        assert set(re.findall(rb"stream_capturable=(\d)", program)) == {b"1"}


def check_programs(bundle: Bundle, record: Any, sms: tuple[int, ...] = SMS) -> None:
    """What the plans themselves say of their passes."""
    kinds = Counter(kind.name.lower() for kind in bundle.config.layers)
    for graph, (engine,) in record.engines.items():
        programs = record.report["engines"][engine.file]["inspector"]["programs"]
        assert [p["profile"] for p in programs] == list(range(len(engine.profiles)))
        for program in programs:
            facts = ("sms", "streams", "events", "waits", "capturable", "expanded")
            assert [program[fact] for fact in facts] == [list(sms), 1, 1, 0, True, []]
            told = program["by_kind"]
            assert sum(kind["kernels"] for kind in told.values()) == program["kernels"]
            if graph != "context_head":
                assert {kind: told[kind]["layers"] for kind in kinds} == kinds
            most = dict(MOST_KERNELS[engine.profiles[program["profile"]].name])
            if 75 in sms and "moe" in most:
                most["moe"] += MORE_FOR_SUMS
            over = [k for k in told.keys() & most.keys() if told[k]["max"] > most[k]]
            assert not over, told


def test_programs_for_one_row_are_read(folder: Path) -> None:
    """No size depends on a call then, and they have no arithmetic on shapes."""
    bundle = exported(folder, "a", "float16")
    check_programs(bundle, build(bundle, max_batch=1, use_cache=False, force=True))


def test_the_library_chooses_its_own_set_of_gpus_when_it_is_asked_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ahead of time and without a GPU. RTX 1.7 writes SM 80 into such programs, whatever else they run on."""
    bundle, builder = exported(folder, "b", "float16"), builder_for("rtx")
    monkeypatch.setenv("TWOTOWER_RTX_ANY_SM", "default")
    record = build(bundle, sms=())
    assert record.limits is not None
    assert record.limits.sms == ()
    programs = programs_of(record)
    assert {tuple(p["sms"]) for p in programs} == {(80,)}
    assert "never tried by us" in caplog.text
    read_engine_record(bundle, "rtx", library=builder.library(), sm=90)
    monkeypatch.setenv("TWOTOWER_RTX_ANY_SM", "current")
    with fails(BuildError, "builds for the GPU at hand only", found="no NVIDIA GPU"):
        build(bundle, sms=())


def test_float16_builds_for_every_compute_capability(folder: Path) -> None:
    """SM 75 has no products in float32: they are sums, and no product of single elements lies in memory."""
    bundle = exported(folder, "tiny", "float16")
    record = build(bundle, sms=RTX_SMS)
    assert not unexplained(record)
    check_programs(bundle, record, RTX_SMS)
    config, chunk = bundle.config, 256
    # Bytes of one product of the scan, 8 rows.
    apart = 4 * 8 * config.mamba_num_heads * chunk * chunk * config.mamba_head_dim
    prefill = record.report["engines"]["context.engine"]["inspector"]["programs"][0]
    assert prefill["scratch"] < apart / 4


@pytest.mark.parametrize("how", ["a memory bound on what is inside", "a number of devices"])
def test_towers_are_cut_and_every_piece_builds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from twotower.builders import build_cost

    bundle = exported(folder, "a", "bfloat16")
    for need in ("_MEMORY_BASE", "_MEMORY_LAYER"):  # they would hide tiny weights
        monkeypatch.setattr(build_cost, need, 0)
    weights = bundle.files["denoiser/model.onnx.data"].size
    asked: dict[str, Any] = {"segments": 3}
    if how.startswith("a memory"):
        asked = {"weights": "inside", "max_build_memory": 2 * weights}
    record = build(bundle, sms=(89,), **asked)
    assert len(record.engines["denoiser"]) > 1
    assert all(a.layers[1] == b.layers[0] for a, b in pairwise(record.engines["denoiser"]))
    assert not unexplained(record)


@pytest.mark.parametrize(
    ("dtype", "config", "says"),
    [
        ("float16", {"sms": (90,)}, "75, 80, 86, 89, 120, 121"),
        ("bfloat16", {"sms": (75, 86)}, "80, 86, 89, 120, 121"),
        ("float16", {"sms": (86,), "max_context": 10**9}, "1 to"),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(
    folder: Path, dtype: str, config: dict[str, Any], says: str
) -> None:
    bundle = exported(folder, "b", dtype)
    with fails((BuildError, ConfigError), found=says):
        build(bundle, **config, force=True)


def test_the_full_library_is_named_with_where_its_wheels_live() -> None:
    with fails(BuildError, do="pypi.nvidia.com"):
        builder_for("trt")


def test_without_a_word_on_experts_kernels_compute_the_chosen_ones(folder: Path) -> None:
    """Compiled by Triton, as a user's build is; `inspect` has programs, kernels and launches."""
    pytest.importorskip("triton")  # make EXTRAS=...,kernels
    bundle = exported(folder, "tiny", "bfloat16")
    words = ["--target", "rtx", "--sm", "89,120", "--max-context", "256"]
    for _ in range(2):
        done = twotower("build", bundle.path, *words)
        assert "note:" not in done.stderr
    assert "kept, because it fits" in done.stderr
    record = read_engine_record(bundle, "rtx", library=builder_for("rtx").library())
    assert not unexplained(record)
    assert [len(record.experts[graph]) for graph in ("context", "denoiser")] == [3, 3]
    programs = programs_of(record)
    assert {(p["streams"], p["capturable"], len(p["expanded"])) for p in programs} == {(1, True, 0)}
    done = twotower("inspect", bundle.path)
    assert re.search(
        r"denoiser denoise: 4 programs \(\d+ kernels\) and 3 layers of experts .*; \d+ launches a pass",
        done.stdout,
    )
    assert "kernels for SM 89, 120, up to 4096 tokens, by Triton" in done.stdout


def test_a_config_alone_is_built_for_and_its_engines_serve_the_checkpoint(folder: Path) -> None:
    words = ["--target", "rtx", "--sm", "89", "--max-context", "256", "--experts", "dense"]
    words += ["--cache", str(folder / "shared")]
    start = ["--from-config", CHECKPOINTS["b"] / "config.json", "--dtype", "bfloat16"]
    bundle = exported(folder, "b", "bfloat16")
    for _ in range(2):
        twotower("build", folder / "programs", *start, *words)
    twotower("build", bundle.path, *words)
    record = load_engine_record(bundle, "rtx")
    assert all(engine["cached"] for engine in record.report["engines"].values())
    assert record.holds == {}
    done = twotower("build", bundle.path, *start, *words, check=False)
    assert done.returncode == 2
    assert "it holds weights" in done.stderr
