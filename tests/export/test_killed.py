"""An export that is stopped at any point leaves no bundle, and nothing in the next one's way."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import fresh_export
from tests.helpers.errors import fails
from tests.helpers.graphs import FIXTURES
from tests.helpers.processes import environment
from tests.helpers.source import ROOT
from twotower.bundle import DATA_SUFFIX, MANIFEST_FILE, Bundle
from twotower.errors import BundleError, CheckpointError, ExportError
from twotower.export import Checkpoint, export_bundle
from twotower.export import exporter as exporter_module

# Says where it is and stays there until it is killed.
CHILD = """
import sys, time
from pathlib import Path
from twotower.export import Checkpoint, export_bundle

checkpoint, output, stage = sys.argv[1:]

def here(*args):
    print("here", flush=True)
    time.sleep(60)

def report(what, done, total):
    if done >= {"first piece": 1, "halfway": total // 2}.get(stage, total + 1):
        here()

if stage == "publishing":
    Path.rename = here
verify = here if stage == "verifying" else None
export_bundle(Checkpoint.open(checkpoint), Path(output), verify=verify, report=report)
"""


def written(folder: Path) -> int:
    """Bytes of weights in a bundle, or in what may become one."""
    return sum(path.stat().st_size for path in folder.rglob(f"*{DATA_SUFFIX}"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["first piece", "halfway", "verifying", "publishing"])
def test_a_kill_at_any_stage_leaves_no_bundle_under_the_name(tmp_path: Path, stage: str) -> None:
    output, words = tmp_path / "b", [str(FIXTURES / "hybrid-b"), str(tmp_path / "b"), stage]
    command = [sys.executable, "-c", CHILD, *words]
    options: Any = {"stdout": subprocess.PIPE, "text": True, "env": environment()}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("."), "what is left is hidden"
    size = written(left)
    with fails(BundleError, "is not a bundle", found="no such folder"):
        Bundle.open(output)
    # From there on the hidden folder is complete, and verified where that was asked for.
    if stage != "publishing":
        with fails(BundleError, found=f"no {MANIFEST_FILE}"):
            Bundle.open(left)
    fresh_export("hybrid-b", output)
    assert list(tmp_path.iterdir()) == [output], "the next export clears away what was left"
    assert (0 < size < written(Bundle.open(output).path)) is (
        stage in ("first piece", "halfway")
    ), "the kill came where it should"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond this size, with an error in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 1000, 4097, 100_001])
def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path, size: int) -> None:
    with pytest.raises(ExportError, match="failed while writing") as caught, largest_file(size):
        fresh_export("hybrid-b", tmp_path / "b")
    assert os.strerror(errno.EFBIG) in caught.value.found
    assert "free disk space" in caught.value.do
    assert list(tmp_path.iterdir()) == []
    fresh_export("hybrid-b", tmp_path / "b")


STEPS: dict[str, tuple[Any, str]] = {
    "saving a graph": (exporter_module, "save_program"),
    "copying the tokenizer": (exporter_module.shutil, "copyfile"),
    "writing the report": (exporter_module, "write_json"),
    "hashing the small files": (exporter_module, "file_records"),
    "publishing": (Path, "rename"),
}


def with_tokenizer(tmp_path: Path) -> Checkpoint:
    shutil.copytree(FIXTURES / "hybrid-b", tmp_path / "source")
    tokenizer = ROOT / "assets" / "twotower-tiny" / "tokenizer.json"
    (tmp_path / "source" / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return Checkpoint.open(tmp_path / "source")


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_is_full_at_any_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """After the weights too, where the bytes that are missing are few."""
    checkpoint = with_tokenizer(tmp_path)

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*STEPS[step], full)
        with pytest.raises(ExportError, match="failed while writing") as caught:
            export_bundle(checkpoint, tmp_path / "out" / "b")
    assert "No space left" in caught.value.found
    assert "nothing was left behind" in caught.value.do
    assert list((tmp_path / "out").iterdir()) == []
    export_bundle(checkpoint, tmp_path / "out" / "b")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, ExportError])
@pytest.mark.parametrize("where", ["report", "verify"])
def test_whatever_stops_an_export_passes_through_and_leaves_nothing(
    tmp_path: Path, kind: type[BaseException], where: str
) -> None:
    failure = ExportError("no", found="no", do="no") if kind is ExportError else kind()

    def stop(*args: Any) -> Any:
        raise failure

    hooks: dict[str, Callable[..., Any]] = {where: stop}
    with pytest.raises(kind) as caught:
        export_bundle(Checkpoint.open(FIXTURES / "hybrid-b"), tmp_path / "b", **hooks)
    assert caught.value is failure
    assert list(tmp_path.iterdir()) == []


def test_a_shard_cut_short_during_the_export_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(tmp_path)

    def cut(*args: Any) -> None:
        for shard in checkpoint.path.glob("*.safetensors"):
            os.truncate(shard, 20_000)

    with fails(CheckpointError, "could not be read", found="ends too early"):
        export_bundle(checkpoint, tmp_path / "out" / "b", report=cut)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["empty folder", "full folder", "file", "link to a folder", "link to nothing"]
)
def test_whatever_has_the_name_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    output, elsewhere = tmp_path / "b", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind.endswith(" folder") and not kind.startswith("link"):
        output.mkdir()
        if kind == "full folder":
            (output / "mine").write_text("precious")
    elif kind == "file":
        output.write_text("precious")
    else:
        output.symlink_to(elsewhere if kind == "link to a folder" else tmp_path / "nowhere")

    def state() -> dict[Path, tuple[int, ...]]:
        found = {path: path.lstat() for path in tmp_path.rglob("*")}
        return {p: (s.st_mode, s.st_mtime_ns, s.st_ino, s.st_size) for p, s in found.items()}

    before = state()
    with fails(ExportError, "exists already", found="never overwritten", do="-o"):
        fresh_export("hybrid-b", output)
    assert before == state()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_takes_the_name_during_the_export_is_untouched(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "b"
    mine = output / "mine" if kind == "folder" else output

    def taken(*args: Any) -> dict[str, Any]:
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("precious")
        return {"verified": True}

    with pytest.raises(ExportError, match="failed"):
        export_bundle(Checkpoint.open(FIXTURES / "hybrid-b"), output, verify=taken)
    assert mine.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [output]
