"""Opening a bundle finds every kind of damage and says what to do about it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import copy_of, export_fixture, flip_byte
from twotower import files
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    MANIFEST_FILE,
    Bundle,
    FileRecord,
    check_files,
    hash_file,
    hash_files,
    inside,
)
from twotower.errors import BundleError, ConfigError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_fixture("hybrid-b", tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def copy(sound: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return copy_of(sound, tmp_path / "copy")


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST_FILE).read_text()))


def edit(folder: Path, **changes: Any) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest(folder), **changes}))


def refused(folder: Path, what: str | None = None) -> BundleError:
    with pytest.raises(BundleError, match=what) as caught:
        Bundle.open(folder)
    return caught.value


def test_sound_bundle_opens_and_describes_itself(sound: Bundle) -> None:
    opened = Bundle.open(sound.path)
    assert opened.config.pattern == "M-M*E"
    assert opened.dtype == "float32"
    assert opened.trained_block_size == 16
    assert opened.tokenizer_file is None
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert set(opened.source["shards"]) == shards
    assert {g + s for g in GRAPH_FILES.values() for s in ("", DATA_SUFFIX)} < set(opened.files)
    assert opened.precision["norm"] == "float32"


def test_every_flipped_byte_is_found(copy: Path) -> None:
    for name in manifest(copy)["files"]:
        flip_byte(copy / name)
        assert name in refused(copy, "damaged").found
        flip_byte(copy / name)
    Bundle.open(copy)


def test_a_flip_after_a_good_opening_is_found_too(copy: Path) -> None:
    """Remembered files are trusted by their identity only; they are hashed once."""
    target = copy / "denoiser/model.onnx.data"
    for path in copy.rglob("*"):
        os.utime(path, (time.time() - 100,) * 2)
    ticks: list[int] = []
    Bundle.open(copy, progress=lambda done, total: ticks.append(done))
    assert ticks
    ticks.clear()
    Bundle.open(copy, progress=lambda done, total: ticks.append(done))
    assert not ticks
    before = target.stat()
    flip_byte(target, 12345)
    # Even a forged time does not help.
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(copy, "damaged")


def test_files_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them meet, which one after the other never would."""
    meeting = threading.Barrier(2)

    def meet(path: Path, tick: Any) -> str:
        meeting.wait(timeout=20)
        return hash_file(path, tick)

    contents = [b"one" * 10**6, b"", b"two", b"one"]
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    monkeypatch.setattr(files, "hash_file", meet)
    ticks: list[int] = []
    found = hash_files(paths, ticks.append)
    assert found == [hashlib.sha256(content).hexdigest() for content in contents]
    assert sum(ticks) == sum(map(len, contents))


def test_an_error_of_one_file_ends_the_hashing_of_others(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(8 << 30)  # without content on the disk
    ticks: list[int] = []
    with pytest.raises(FileNotFoundError):
        hash_files([large, tmp_path / "none"], ticks.append)
    assert sum(ticks) < 1 << 30


def test_missing_and_truncated_files_are_named_together(copy: Path) -> None:
    (copy / "context/head.onnx").unlink()
    with (copy / "denoiser/model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    for contents in (True, False):
        with pytest.raises(BundleError) as caught:
            Bundle.open(copy, contents=contents)
        assert "context/head.onnx" in caught.value.found
        assert "denoiser/model.onnx.data" in caught.value.found


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", "C:outside", ""]
)
def test_paths_may_not_lead_out(copy: Path, name: str) -> None:
    assert inside(copy, name) is None
    edit(copy, files={**manifest(copy)["files"], name: {"size": 1, "sha256": "0"}})
    refused(copy, "damaged")


def test_a_link_may_not_lead_out(copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (copy / "link").symlink_to(secret)
    problems = check_files(copy, {"link": FileRecord(1, hash_file(secret))})
    assert problems == ["link: leads out of the folder"]


@pytest.mark.parametrize(
    ("schema", "do"),
    [
        (None, "export"),
        (0, "export"),
        (1, "exported from 'hybrid-b'"),
        ("2", "export"),
        (3, "upgrade"),
    ],
)
def test_other_schemas_are_refused_with_the_command_that_mends_it(
    copy: Path, schema: Any, do: str
) -> None:
    edit(copy, schema=schema)
    error = refused(copy, "schema")
    assert "schema 2" in error.found
    assert do in error.do
    edit(copy, schema=1, quantization={"recipe": {"name": "mixed"}})
    assert "twotower quantize NEW --recipe mixed" in refused(copy, "schema").do


def test_fields_of_later_versions_are_left_alone_unless_they_are_required(copy: Path) -> None:
    edit(copy, colour="blue", requires=[])
    assert Bundle.open(copy).requires == frozenset()
    edit(copy, requires=["every-position"])
    assert "every-position" in refused(copy, "newer version").found


def test_a_bundle_of_graphs_alone_says_so_when_weights_are_needed(copy: Path) -> None:
    listed = manifest(copy)["files"]
    for graph in GRAPH_FILES.values():
        (copy / (graph + DATA_SUFFIX)).unlink()
        del listed[graph + DATA_SUFFIX]
    edit(copy, files=listed)
    refused(copy, "damaged")
    edit(copy, requires=["no-weights"])
    bundle = Bundle.open(copy)
    assert not bundle.has_weights
    assert sum(ref.nbytes for ref in bundle.weights("denoiser").values()) > 10**5
    with pytest.raises(BundleError, match="holds none"):
        bundle.require_weights("generation")


@pytest.mark.parametrize(
    "key", ["model", "dtype", "files", "generation", "signatures", "source", "tools", "precision"]
)
def test_incomplete_manifests_are_refused(copy: Path, key: str) -> None:
    data = manifest(copy)
    del data[key]
    (copy / MANIFEST_FILE).write_text(json.dumps(data))
    refused(copy)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"files": {"a": {"size": "3", "sha256": ""}}}, "files[\"a\"].size: '3'"),
        ({"generation": {"trained_block_size": "x"}}, "trained_block_size: 'x'"),
        ({"quantization": {"recipe": {}, "formats": [], "measured": None}}, "quantization.recipe"),
        *(({"requires": requires}, "requires") for requires in (None, 5, "no-weights", [1])),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named_by_its_path(
    copy: Path, changes: dict[str, Any], found: str
) -> None:
    edit(copy, **changes)
    assert refused(copy, "not complete").found.startswith(found)


def test_what_is_no_bundle_is_refused(tmp_path: Path, copy: Path) -> None:
    for path, found in ((tmp_path, "no bundle.json"), (tmp_path / "nowhere", "no such folder")):
        error = refused(path)
        assert found in error.found
        assert "twotower export" in error.do
    (copy / MANIFEST_FILE).write_text("{")
    refused(copy, "not JSON")


def test_unknown_model_keys_and_foreign_signatures_are_refused(copy: Path) -> None:
    model = manifest(copy)["model"]
    edit(copy, model={**model, "rope": True})
    with pytest.raises(ConfigError, match="not readable"):
        Bundle.open(copy)
    edit(copy, model=model, signatures={})
    refused(copy, "inputs or outputs")
