"""The list of compiled kernels: read without Triton; damaged and foreign files are refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.errors import check_error
from tests.helpers.expert_layers import make_shape
from tests.helpers.fake_kernels import write_kernels
from twotower.cli.main import build_parser
from twotower.errors import BundleError
from twotower.kernels import Manifest, read_manifest
from twotower.kernels.cubin_manifest import MANIFEST, build_command


@pytest.fixture
def written(tmp_path: Path) -> Manifest:
    return write_kernels(
        tmp_path / "k", make_shape(64, 48, 8, 2, shared=96, routed="int8"), (80, 90)
    )


def test_it_is_read_as_it_was_written(written: Manifest) -> None:
    assert read_manifest(written.folder) == written
    assert written.sms == (80, 90)
    assert all(written.code(cubin) for cubin in written.cubins)


def test_a_damaged_file_is_refused(written: Manifest) -> None:
    cubin = written.cubins[3]
    path = written.folder / cubin.file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="damaged") as e:
        read_manifest(written.folder).code(cubin)
    check_error(str(e.value), e.value.what)


def test_a_file_of_another_gpu_in_its_place_is_refused(written: Manifest) -> None:
    cubin, other = written.cubin("combine", 80), written.cubin("combine", 90)
    (written.folder / cubin.file).write_bytes((written.folder / other.file).read_bytes())
    with pytest.raises(BundleError, match="another build"):
        written.code(cubin)


def test_a_missing_file_is_refused(written: Manifest) -> None:
    (written.folder / written.cubins[0].file).unlink()
    with pytest.raises(BundleError, match="cannot be read") as e:
        written.code(written.cubins[0])
    check_error(str(e.value), e.value.what)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", 2),
        ("shape", None),
        ("cubins", [{"file": "../x"}]),
        ("cubins", 3),
        ("triton", ...),
    ],
)
def test_a_damaged_list_is_refused(written: Manifest, key: str, value: object) -> None:
    path = written.folder / MANIFEST
    data = json.loads(path.read_text())
    if value is ...:
        del data[key]
    else:
        data[key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="damaged") as e:
        read_manifest(written.folder)
    check_error(str(e.value), e.value.what)


def test_a_file_outside_the_folder_is_not_read(written: Manifest) -> None:
    path = written.folder / MANIFEST
    data = json.loads(path.read_text())
    data["cubins"][0]["file"] = "../manifest.json"
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match="damaged"):
        read_manifest(written.folder)


def test_no_list_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read") as e:
        read_manifest(tmp_path / "b" / "engines" / "trt" / "experts-1")
    check_error(str(e.value), e.value.what)
    assert f"`twotower build {tmp_path}/b --target trt --experts kernels --force`" in e.value.do


def damage_list(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def damage_file(folder: Path) -> None:
    (folder / "combine.sm90.cubin").write_bytes(b"")


def remove_file(folder: Path) -> None:
    (folder / "combine.sm90.cubin").unlink()


@pytest.mark.parametrize(
    ("harm", "sms"),
    [(damage_list, ""), (damage_file, " --sm 80,90"), (remove_file, " --sm 80,90")],
)
def test_the_command_that_mends_it_is_named(
    tmp_path: Path, harm: Callable[[Path], None], sms: str
) -> None:
    folder = tmp_path / "b" / "engines" / "rtx" / "experts-1"
    write_kernels(folder, make_shape(64, 48, 8, 2), (80, 90))
    harm(folder)
    with pytest.raises(BundleError) as e:
        manifest = read_manifest(folder)
        manifest.code(manifest.cubin("combine", 90))
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
