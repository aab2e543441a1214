"""The list of compiled kernels: read without Triton; damaged and foreign files are refused."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import make_shape
from tests.helpers.fake_kernels import write_kernels
from twotower.cli.main import build_parser
from twotower.errors import BundleError
from twotower.kernels import read_manifest
from twotower.kernels.cubin_manifest import MANIFEST, build_command


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    shape = make_shape(64, 48, 8, 2, shared=96, routed="int8")
    written = write_kernels(tmp_path / "k", shape, (80, 90))
    assert read_manifest(written.folder) == written
    assert written.sms == (80, 90)
    assert all(written.code(cubin) for cubin in written.cubins)


def edited(**entries: Any) -> Callable[[Path], None]:
    """Writes other entries into the list; ... takes one out."""

    def edit(folder: Path) -> None:
        data = {**json.loads((folder / MANIFEST).read_text()), **entries}
        kept = {key: value for key, value in data.items() if value is not ...}
        (folder / MANIFEST).write_text(json.dumps(kept))

    return edit


def point_outside(folder: Path) -> None:
    cubins = json.loads((folder / MANIFEST).read_text())["cubins"]
    edited(cubins=[{**cubins[0], "file": "../manifest.json"}, *cubins[1:]])(folder)


def exchange(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / "combine.sm80.cubin").read_bytes())


FILE = "combine.sm90.cubin"
SMS = " --sm 80,90"


@pytest.mark.parametrize(
    ("harm", "says", "sms"),
    [
        (lambda folder: (folder / FILE).write_bytes(b"?"), "damaged", SMS),
        (lambda folder: (folder / FILE).unlink(), "cannot be read", SMS),
        (exchange, "another build", SMS),
        (shutil.rmtree, "cannot be read", ""),
        (lambda folder: (folder / MANIFEST).write_text("{"), "damaged", ""),
        (edited(schema=2), "damaged", ""),
        (edited(shape=None), "damaged", ""),
        (edited(cubins=[{"file": "../x"}]), "damaged", ""),
        (edited(cubins=3), "damaged", ""),
        (edited(triton=...), "damaged", ""),
        (point_outside, "damaged", ""),
    ],
)
def test_what_is_damaged_or_missing_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, harm: Callable[[Path], None], says: str, sms: str
) -> None:
    folder = tmp_path / "b" / "engines" / "rtx" / "experts-1"
    write_kernels(folder, make_shape(64, 48, 8, 2), (80, 90))
    harm(folder)
    with pytest.raises(BundleError, match=says) as e:
        manifest = read_manifest(folder)
        manifest.code(manifest.cubin("combine", 90))
    check_error(str(e.value), e.value.what)
    command = f"`twotower build {tmp_path}/b --target rtx{sms} --experts kernels --force`"
    assert command in e.value.do
    build_parser().parse_args(shlex.split(command.strip("`"))[1:])


@pytest.mark.parametrize(
    ("folder", "sms", "words"),
    [
        ("bundle/engines/rtx/experts-1", (90, 80), "bundle --target rtx --sm 80,90"),
        ("bundle/engines/trt/experts-1", (80,), "bundle --target trt"),
        ("k", (), "BUNDLE --target rtx"),
    ],
)
def test_a_folder_tells_the_bundle(folder: str, sms: tuple[int, ...], words: str) -> None:
    command = f"`twotower build {words} --experts kernels --force`"
    assert build_command(Path(folder), sms) == command
