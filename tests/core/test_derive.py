"""Bundles derived from bundles: other presets and the same files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.bundles import built_fixture
from twotower.bundle import Bundle, derive_bundle
from twotower.config import GenerationConfig
from twotower.errors import BundleError, ConfigError
from twotower.runtime import TwoTower

PRESETS = {
    "balanced": GenerationConfig(confidence_threshold=0.7),
    "fast": GenerationConfig(confidence_threshold=0.4, steps_per_block=3),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return built_fixture("hybrid-a", tmp_path_factory.mktemp("derive") / "b")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_presets_are_stored_and_used(original: Bundle, tmp_path: Path) -> None:
    before = contents(original.path)
    derived = derive_bundle(
        original, tmp_path / "d", presets=PRESETS, default="balanced", reports={"tune": {"a": 1}}
    )
    assert (derived.presets, derived.defaults) == (PRESETS, PRESETS["balanced"])
    assert json.loads((tmp_path / "d" / "reports" / "tune.json").read_text()) == {"a": 1}
    assert contents(original.path) == before
    assert original.presets == {}
    for preset, config in {None: PRESETS["balanced"], **PRESETS}.items():
        with TwoTower.open(tmp_path / "d", preset=preset) as model:  # its engines fit it
            assert model.defaults == config
            assert model.target == "ort-cpu"
            assert (
                model.generate(
                    [5, 6, 7], GenerationConfig(max_new_tokens=4, ignore_eos=True)
                ).usage.completion_tokens
                == 4
            )
    with pytest.raises(ConfigError, match="no preset 'slow'") as caught:
        TwoTower.open(tmp_path / "d", preset="slow")
    assert "balanced, fast" in caught.value.found


def test_files_are_shared_where_that_is_possible(
    original: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derive_bundle(original, tmp_path / "linked", presets=PRESETS, default="fast")
    data = next(iter((tmp_path / "linked").rglob("*.data")))
    assert data.stat().st_nlink > 1

    def refused(*args: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refused)
    derive_bundle(original, tmp_path / "copied", presets=PRESETS, default="fast")
    linked, copied = contents(tmp_path / "linked"), contents(tmp_path / "copied")
    assert linked == copied
    assert next(iter((tmp_path / "copied").rglob("*.data"))).stat().st_nlink == 1


def test_the_cache_and_what_failed_stay_behind(tmp_path: Path) -> None:
    """They can be larger than the engines in use, and locks mean nothing elsewhere."""
    original = built_fixture("hybrid-b", tmp_path / "b")
    for name in (
        ".cache/aa.engine",
        ".cache/aa.json",
        ".failed/rtx-denoiser/graph.onnx",
        ".rtx.x1/denoiser.engine",
        ".rtx.lock",
    ):
        file = original.path / "engines" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert Bundle.open(original.path).files == original.files, (
        "nor do they disturb their own bundle"
    )
    derived = derive_bundle(original, tmp_path / "d", presets=PRESETS, default="fast")
    assert {p.name for p in (derived.path / "engines").iterdir()} == {"ort-cpu"}


def test_a_derived_bundle_can_be_derived_from_without_touching_it(
    original: Bundle, tmp_path: Path
) -> None:
    one = derive_bundle(
        original, tmp_path / "one", presets=PRESETS, default="fast", reports={"tune": {"n": 1}}
    )
    derive_bundle(
        one, tmp_path / "two", presets=PRESETS, default="fast", reports={"tune": {"n": 2}}
    )
    assert json.loads((tmp_path / "one" / "reports" / "tune.json").read_text()) == {"n": 1}


def test_what_exists_is_not_touched_and_failures_leave_nothing(
    original: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    with pytest.raises(BundleError, match="exists already"):
        derive_bundle(original, tmp_path / "d", presets=PRESETS, default="fast")
    (tmp_path / "d").rmdir()

    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("twotower.bundle.manifest.write_json", full)
    with pytest.raises(BundleError, match="could not be written"):
        derive_bundle(original, tmp_path / "d", presets=PRESETS, default="fast")
    assert not list(tmp_path.iterdir())
