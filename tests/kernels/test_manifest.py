"""The list of compiled kernels: read without Triton; damaged and foreign files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.errors import check_error
from tests.helpers.kernel_stand_in import write_kernels
from tests.helpers.layers_of_experts import make_shape
from twotower.errors import BundleError
from twotower.kernels import Manifest, read_manifest
from twotower.kernels.manifest import MANIFEST


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
        read_manifest(tmp_path)
    check_error(str(e.value), e.value.what)
