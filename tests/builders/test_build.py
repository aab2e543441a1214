"""One build from start to publication: interrupted, killed, twice at once, on a full disk, with engines out of the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import copy_of, flip_byte
from tests.helpers.errors import check_error
from tests.helpers.graphs import FIXTURES
from tests.helpers.processes import child_of, is_gone
from tests.helpers.trt.install import plant
from twotower.builders import BuildConfig, EngineBuilder, build_engines
from twotower.bundle import BUILD_FILE, Bundle, engine_folder, read_engine_record
from twotower.cli.main import main
from twotower.errors import BuildError, ConfigError

CONFIG = BuildConfig(max_context=256, experts="dense")


@pytest.fixture
def bundle(damageable: Bundle) -> Bundle:
    return damageable


@pytest.fixture
def builder(fake_builder: EngineBuilder) -> EngineBuilder:
    return fake_builder


def engines(bundle: Bundle) -> set[str]:
    return {p.name for p in (bundle.path / "engines").iterdir()}


def origin(record: Any) -> dict[str, bool]:
    return {name: facts["cached"] for name, facts in record.report["engines"].items()}


@pytest.mark.slow
def test_an_earlier_list_of_options_comes_out_of_the_cache(
    bundle: Bundle, builder: EngineBuilder
) -> None:
    first = build_engines(bundle, "trt", builder, config=CONFIG)
    other = build_engines(
        bundle, "trt", builder, config=BuildConfig(max_context=512, experts="dense")
    )
    assert origin(other)["context.engine"] is False
    again = build_engines(bundle, "trt", builder, config=CONFIG)
    assert set(origin(again).values()) == {True}
    assert (again.files, again.limits, again.engines) == (first.files, first.limits, first.engines)
    told = [
        {k: v for k, v in r.report["engines"]["denoiser.engine"].items() if k != "cached"}
        for r in (first, again)
    ]
    assert told[0] == told[1], "what was observed is kept with the engine"
    forced = build_engines(
        bundle, "trt", builder, config=BuildConfig(max_context=256, experts="dense", force=True)
    )
    assert set(origin(forced).values()) == {False}


@pytest.mark.slow
def test_a_build_that_fails_late_goes_on_from_there(bundle: Bundle, builder: EngineBuilder) -> None:
    intact = bundle.graph_file("denoiser").read_bytes()
    plant(bundle, "denoiser", "RefuseBuild")
    with pytest.raises(BuildError):
        build_engines(bundle, "trt", builder, config=CONFIG)
    bundle.graph_file("denoiser").write_bytes(intact)
    record = build_engines(bundle, "trt", builder, config=CONFIG)
    assert origin(record) == {
        "context.engine": True,
        "context_head.engine": True,
        "denoiser.engine": False,
    }


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_engine_and_its_entry_are_built_again(
    bundle: Bundle, builder: EngineBuilder, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Both are one file: what damages the engine in place damages the entry."""
    build_engines(bundle, "trt", builder, config=CONFIG)
    engine = engine_folder(bundle, "trt") / "denoiser.engine"
    if damage == "flip":
        flip_byte(engine, 10)
    else:
        os.truncate(engine, 10)
    record = build_engines(bundle, "trt", builder, config=CONFIG)
    assert origin(record) == {
        "context.engine": True,
        "context_head.engine": True,
        "denoiser.engine": False,
    }
    assert "damaged" in caplog.text
    read_engine_record(bundle, "trt", library=builder.library())


@pytest.mark.slow
def test_two_bundles_share_a_named_cache(
    bundle: Bundle, builder: EngineBuilder, tmp_path: Path
) -> None:
    other = Bundle.open(copy_of(bundle, tmp_path / "elsewhere"))
    config = BuildConfig(max_context=256, experts="dense", cache=tmp_path / "shared")
    build_engines(bundle, "trt", builder, config=config)
    assert ".cache" not in engines(bundle)
    assert set(origin(build_engines(other, "trt", builder, config=config)).values()) == {True}


@pytest.mark.slow
def test_without_a_cache_nothing_is_kept(bundle: Bundle, builder: EngineBuilder) -> None:
    build_engines(
        bundle,
        "trt",
        builder,
        config=BuildConfig(max_context=256, experts="dense", use_cache=False),
    )
    assert ".cache" not in engines(bundle)


@pytest.mark.slow
def test_the_cache_is_bounded_after_a_build(bundle: Bundle, builder: EngineBuilder) -> None:
    for length in (256, 512, 1024):
        build_engines(
            bundle,
            "trt",
            builder,
            config=BuildConfig(max_context=length, experts="dense", cache_bytes=0),
        )
    kept = list((bundle.path / "engines" / ".cache").glob("*.engine"))
    assert len(kept) == 3, "those in use, which cost nothing"
    assert {p.stat().st_ino for p in kept} == {
        p.stat().st_ino for p in engine_folder(bundle, "trt").glob("*.engine")
    }


def test_a_cache_that_cannot_be_written_is_said_before_any_work(
    bundle: Bundle, builder: EngineBuilder, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="engine cache") as caught:
        build_engines(bundle, "trt", builder, config=BuildConfig(cache=tmp_path / "file" / "x"))
    assert str(tmp_path / "file") in caught.value.what
    assert not (bundle.path / "engines").exists()
    (bundle.path / "engines").mkdir()
    (bundle.path / "engines" / ".cache").write_text("")
    with pytest.raises(BuildError, match="engine cache"):
        build_engines(bundle, "trt", builder, config=CONFIG)
    with pytest.raises(ConfigError, match="--cache-size"):
        BuildConfig(cache_bytes=-1)


def test_an_unwritable_bundle_is_named(bundle: Bundle, builder: EngineBuilder) -> None:
    (bundle.path / "engines").write_text("not a folder")
    with pytest.raises(BuildError, match="could not be written") as caught:
        build_engines(bundle, "trt", builder, config=CONFIG)
    assert str(bundle.path) in caught.value.what


def test_what_a_killed_build_left_is_mended(bundle: Bundle, builder: EngineBuilder) -> None:
    """Killed between its two renames, and another time in the middle."""
    build_engines(bundle, "trt", builder, config=CONFIG)
    folder = engine_folder(bundle, "trt")
    folder.rename(folder.with_name(".trt.old.4711"))
    (folder.parent / ".trt.abcdefgh" / "scratch").mkdir(parents=True)
    before = (folder.with_name(".trt.old.4711") / BUILD_FILE).stat().st_mtime_ns
    build_engines(bundle, "trt", builder, config=CONFIG)
    assert (folder / BUILD_FILE).stat().st_mtime_ns == before, (
        "the engine that was there is there again"
    )
    assert engines(bundle) == {"trt", ".trt.lock", ".trt.timing", ".cache"}


# With the real library, as it is typed


def export(folder: Path) -> Path:
    arguments = [
        "export",
        str(FIXTURES / "hybrid-a"),
        "-o",
        str(folder / "b"),
        "--dtype",
        "float16",
        "--no-verify",
    ]
    assert main(arguments) == 0
    return folder / "b"


def command(bundle: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "twotower.cli",
        "build",
        str(bundle),
        "--target",
        "rtx",
        "--sm",
        "86",
        "--max-context",
        "256",
        "--experts",
        "dense",
        *options,
    ]


def start(words: list[str]) -> subprocess.Popen[str]:
    """In a group of its own and with Ctrl-C heeded, as a shell starts it; a test run in the background would hand down its deafness."""
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": paths}
    how: dict[str, Any] = {
        "start_new_session": True,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **how
    )


@pytest.mark.trt_rtx
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_build_leaves_the_old_engine_and_no_process(tmp_path: Path) -> None:
    """Ctrl-C (the whole group), a polite end of the command alone, and one without a chance to clean up."""
    bundle = export(tmp_path)
    assert (
        subprocess.run(
            command(bundle),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        ).returncode
        == 0
    )
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
        if number != signal.SIGKILL:
            assert (build.returncode, "interrupted" in err, "Traceback" in err) == (
                130,
                True,
                False,
            ), err
            assert "goes on from there" in err
        assert (bundle / "engines" / "rtx" / BUILD_FILE).read_bytes() == record, (
            f"{number.name}: {err}"
        )
        if number != signal.SIGKILL:
            assert {p.name for p in (bundle / "engines").iterdir()} == {
                "rtx",
                ".rtx.lock",
                ".cache",
            }
        else:
            assert build.returncode == -signal.SIGKILL
    last = start(command(bundle))
    assert last.wait() == 0
    assert {p.name for p in (bundle / "engines").iterdir()} == {"rtx", ".rtx.lock", ".cache"}, (
        "what the killed one left is swept"
    )


@pytest.mark.trt_rtx
@pytest.mark.slow
def test_two_builds_at_once_make_one_engine(tmp_path: Path) -> None:
    bundle = export(tmp_path)
    builds = [start(command(bundle, "--json")) for _ in range(2)]
    records = [json.loads(b.communicate(timeout=120)[0]) for b in builds]
    assert [b.returncode for b in builds] == [0, 0]
    assert records[0] == records[1], "the second finds what the first has built"
    assert {p.name for p in (bundle / "engines").iterdir()} == {"rtx", ".rtx.lock", ".cache"}


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
