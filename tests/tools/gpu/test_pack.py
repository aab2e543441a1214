"""The pack is made piece by piece, once, and each folder of it fits into a transfer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.errors import check_error
from tools.gpu import pack, prepare
from tools.gpu.pack import Step, make_step
from tools.gpu.questions import CALL_SECONDS


class Maker:
    """A piece that counts how often it is made."""

    def __init__(self, size: int = 10) -> None:
        self.times, self.size = 0, size

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "call1" / "it").mkdir(parents=True)
        (folder / "call1" / "it" / "file").write_bytes(bytes(self.size))


def step(make: Maker, key: str = "1", *, sources: bool = False) -> Step:
    return Step("it", ("call1/it",), make, key, sources=sources)


def test_a_piece_is_made_once_until_what_it_is_made_from_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or until it is gone."""
    make = Maker()
    for times, sources, given in (
        (1, "", step(make)),
        (2, "", step(make, "2")),
        (3, "one", step(make, "2", sources=True)),
        (4, "two", step(make, "2", sources=True)),
    ):
        monkeypatch.setattr(pack, "_sources", lambda sources=sources: sources)
        assert make_step(given, tmp_path)
        assert make_step(given, tmp_path)
        assert make.times == times
    assert "it: is there" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "call1" / "it")
    make_step(given, tmp_path)
    assert make.times == 5


def test_a_piece_without_its_library_is_left_out_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(folder: Path) -> None:
        raise ImportError("no a_library")

    steps = (Step("lacks", ("call1/no",), lacking, ""), step(Maker()))
    monkeypatch.setattr(pack, "prepare_steps", lambda python: steps)
    assert pack.main(["--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "lacks: NOT made, a library is missing: no a_library" in out
    assert "it: made" in out
    assert 'make gpu-first-hour ARGS="--sections machine,' in out
    assert f"--budget {CALL_SECONDS[1]} --out OUT/call1" in out
    assert 'make gpu-page ARGS="OUT/call1/results.json"' in out


def test_a_folder_that_is_too_large_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "LIMIT", 1000)
    monkeypatch.setattr(pack, "prepare_steps", lambda python: (step(Maker(size=1001)),))
    assert pack.main(["--out", str(tmp_path)]) == 2
    check_error(capsys.readouterr().err, "too large for one transfer")


def test_what_exports_runs_from_a_folder_it_was_copied_to(tmp_path: Path) -> None:
    """Neither torch nor onnx brings these to a bare machine."""
    for name in prepare.EXPORTING:
        prepare._copy_distribution(name, tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import onnx_ir, packaging as p"
    print_files = "print(onnx_ir.__file__, p.__file__, sep='\\n')"
    command = [sys.executable, "-c", f"{code}; {print_files}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [Path(line).parent.parent for line in out.split()] == [tmp_path, tmp_path]
    assert "onnx-ir " in prepare.carried()


def test_sources_have_one_hash() -> None:
    assert pack._sources() == pack._sources()
    assert len(pack._sources()) == 64
