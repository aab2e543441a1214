"""One build from start to publication: interrupted, killed, twice at once, on a full disk, with engines out of the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import copy_of, export_fixture, flip_byte
from tests.helpers.errors import check_error, fails
from tests.helpers.processes import child_of, environment, is_gone
from tests.helpers.trt.install import plant
from twotower.builders import BuildConfig, EngineBuilder, build_engines
from twotower.bundle import BUILD_FILE, Bundle, EngineRecord, engine_folder, read_engine_record
from twotower.cli.main import main
from twotower.errors import BuildError, ConfigError

CONFIG = BuildConfig(max_context=256, experts="dense")
FROM_THERE = {"context.engine": True, "context_head.engine": True, "denoiser.engine": False}
"""Which engines come out of the cache where the last one is missing."""


def build(bundle: Bundle, builder: EngineBuilder, **options: Any) -> EngineRecord:
    return build_engines(bundle, "trt", builder, config=replace(CONFIG, **options))


def engines(bundle: Bundle) -> set[str]:
    return {p.name for p in (bundle.path / "engines").iterdir()}


def origin(record: Any) -> dict[str, bool]:
    return {name: facts["cached"] for name, facts in record.report["engines"].items()}


@pytest.mark.slow
def test_an_earlier_list_of_options_comes_out_of_the_cache(
    bundle: Bundle, builder: EngineBuilder
) -> None:
    first = build(bundle, builder)
    other = build(bundle, builder, max_context=512)
    assert origin(other)["context.engine"] is False
    again = build(bundle, builder)
    assert set(origin(again).values()) == {True}
    assert (again.files, again.limits, again.engines) == (first.files, first.limits, first.engines)
    told = [dict(r.report["engines"]["denoiser.engine"], cached=None) for r in (first, again)]
    assert told[0] == told[1], "what was observed is kept with the engine"
    forced = build(bundle, builder, force=True)
    assert set(origin(forced).values()) == {False}


@pytest.mark.slow
def test_a_build_that_fails_late_goes_on_from_there(bundle: Bundle, builder: EngineBuilder) -> None:
    intact = bundle.graph_file("denoiser").read_bytes()
    plant(bundle, "denoiser", "RefuseBuild")
    with pytest.raises(BuildError):
        build(bundle, builder)
    bundle.graph_file("denoiser").write_bytes(intact)
    record = build(bundle, builder)
    assert origin(record) == FROM_THERE


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_engine_and_its_entry_are_built_again(
    bundle: Bundle, builder: EngineBuilder, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Both are one file: what damages the engine in place damages the entry."""
    build(bundle, builder)
    engine = engine_folder(bundle, "trt") / "denoiser.engine"
    if damage == "flip":
        flip_byte(engine, 10)
    else:
        os.truncate(engine, 10)
    record = build(bundle, builder)
    assert origin(record) == FROM_THERE
    assert "damaged" in caplog.text
    read_engine_record(bundle, "trt", library=builder.library())


@pytest.mark.slow
def test_two_bundles_share_a_named_cache(
    bundle: Bundle, builder: EngineBuilder, tmp_path: Path
) -> None:
    other = Bundle.open(copy_of(bundle, tmp_path / "elsewhere"))
    cache = tmp_path / "shared"
    build(bundle, builder, cache=cache)
    assert ".cache" not in engines(bundle)
    assert set(origin(build(other, builder, cache=cache)).values()) == {True}


@pytest.mark.slow
def test_without_a_cache_nothing_is_kept(bundle: Bundle, builder: EngineBuilder) -> None:
    build(bundle, builder, use_cache=False)
    assert ".cache" not in engines(bundle)


@pytest.mark.slow
def test_the_cache_is_bounded_after_a_build(bundle: Bundle, builder: EngineBuilder) -> None:
    for length in (256, 512, 1024):
        build(bundle, builder, max_context=length, cache_bytes=0)
    kept = list((bundle.path / "engines" / ".cache").glob("*.engine"))
    assert len(kept) == 3, "those in use, which cost nothing"
    assert {p.stat().st_ino for p in kept} == {
        p.stat().st_ino for p in engine_folder(bundle, "trt").glob("*.engine")
    }


def test_a_cache_that_cannot_be_written_is_said_before_any_work(
    bundle: Bundle, builder: EngineBuilder, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with fails(BuildError, "engine cache", what=str(tmp_path / "file")):
        build(bundle, builder, cache=tmp_path / "file" / "x")
    assert not (bundle.path / "engines").exists()
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / ".cache").write_text("")
    with pytest.raises(BuildError, match="engine cache"):
        build(bundle, builder)
    with pytest.raises(ConfigError, match="--cache-size"):
        BuildConfig(cache_bytes=-1)


def test_an_unwritable_bundle_is_named(bundle: Bundle, builder: EngineBuilder) -> None:
    (bundle.path / "engines").write_text("not a folder")
    with fails(BuildError, "could not be written", what=str(bundle.path)):
        build(bundle, builder)


def test_what_a_killed_build_left_is_mended(bundle: Bundle, builder: EngineBuilder) -> None:
    """Killed between its two renames, and another time in the middle."""
    build(bundle, builder)
    folder = engine_folder(bundle, "trt")
    folder.rename(folder.with_name(".trt.old.4711"))
    (folder.parent / ".trt.abcdefgh" / "scratch").mkdir(parents=True)
    before = (folder.with_name(".trt.old.4711") / BUILD_FILE).stat().st_mtime_ns
    build(bundle, builder)
    assert (folder / BUILD_FILE).stat().st_mtime_ns == before, (
        "the engine that was there is there again"
    )
    assert engines(bundle) == {"trt", ".trt.lock", ".trt.timing", ".cache"}


# With the real library, as it is typed

PUBLISHED = {"rtx", ".rtx.lock", ".cache"}


def export(folder: Path) -> Path:
    return export_fixture("hybrid-a", folder / "b", "float16").path


def command(bundle: Path, *options: str) -> list[str]:
    words = ["--target", "rtx", "--sm", "86", "--max-context", "256", "--experts", "dense"]
    return [sys.executable, "-m", "twotower.cli", "build", str(bundle), *words, *options]


def start(words: list[str]) -> subprocess.Popen[str]:
    """In a group of its own, and heeding Ctrl-C even where the test run ignores it."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.trt_rtx
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_build_leaves_the_old_engine_and_no_process(tmp_path: Path) -> None:
    """Ctrl-C (the whole group), a polite end of the command alone, and one without a chance to clean up."""
    bundle = export(tmp_path)
    assert start(command(bundle)).wait() == 0
    record = (bundle / "engines" / "rtx" / BUILD_FILE).read_bytes()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        build = start(command(bundle, "--force"))
        child = child_of(build.pid)
        time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(build.pid, number)
        else:
            os.kill(build.pid, number)
        _, err = build.communicate(timeout=30)
        assert is_gone(child), f"{number.name} leaves a process behind"
        assert (bundle / "engines" / "rtx" / BUILD_FILE).read_bytes() == record, err
        if number == signal.SIGKILL:
            assert build.returncode == -signal.SIGKILL
        else:
            assert build.returncode == 130, err
            assert "interrupted" in err
            assert "Traceback" not in err
            assert "resumes after them" in err
            assert {p.name for p in (bundle / "engines").iterdir()} == PUBLISHED
    last = start(command(bundle))
    assert last.wait() == 0
    names = {p.name for p in (bundle / "engines").iterdir()}
    assert names == PUBLISHED, "what the killed one left is swept"


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_two_builds_at_once_make_one_engine(tmp_path: Path) -> None:
    bundle = export(tmp_path)
    builds = [start(command(bundle, "--json")) for _ in range(2)]
    records = [json.loads(b.communicate(timeout=120)[0]) for b in builds]
    assert [b.returncode for b in builds] == [0, 0]
    assert records[0] == records[1], "the second finds what the first has built"
    assert {p.name for p in (bundle / "engines").iterdir()} == PUBLISHED


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--sm", "86,x"], "--sm '86,x'"),
        (["--sm", "90"], "SM 90"),
        (["--sm", "75", "--max-context", "99999999"], "--max-context 99999999"),
        (["--max-build-memory", "lots"], "--max-build-memory 'lots'"),
        (["--experts", "dense", "--max-build-memory", "1K"], "layer 0"),
        (["--cache-size", "many"], "--cache-size 'many'"),
        (["--max-batch", "0"], "--max-batch"),
        (["--cache", "/dev/null/x"], "/dev/null/x"),
    ],
)
@pytest.mark.trt_rtx
def test_options_no_build_can_honour(
    bundle: Bundle, capsys: pytest.CaptureFixture[str], options: list[str], what: str
) -> None:
    assert main(["build", str(bundle.path), "--target", "rtx", *options]) == 2
    check_error(capsys.readouterr().err, what)
    assert not list(bundle.path.glob("engines/rtx"))
