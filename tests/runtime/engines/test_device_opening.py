"""Engines that read their weights from the bundle: any checkpoint of the shape, nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.bundles import flip_byte
from tests.helpers.trt.execution import engines_changed
from tests.helpers.trt.install import bundle_with_engines
from tests.runtime.engines.test_trt_open import open_
from twotower import GenerationConfig
from twotower.builders import build_engines, builder_for
from twotower.bundle import (
    BUILD_FILE,
    GRAPH_FILES,
    MANIFEST_FILE,
    Bundle,
    engine_folder,
    hash_file,
    unverified_files,
)
from twotower.errors import BundleError, EngineMismatchError, TwoTowerError
from twotower.runtime import TwoTower
from twotower.runtime.weights.store import WeightStore

OPTIONS = GenerationConfig(max_new_tokens=32, confidence_threshold=0.5, ignore_eos=True)
PROMPT = [5, 6, 7, 8]


def fine_tuned(bundle: Bundle) -> Bundle:
    """The same bundle with other weights in the same places, as training on would leave it."""
    manifest = json.loads((bundle.path / MANIFEST_FILE).read_text())
    rng = np.random.default_rng(3)
    for name, graph in GRAPH_FILES.items():
        data = np.memmap(bundle.data_file(name), dtype=np.float32, mode="r+")
        for weight, ref in bundle.weights(name).items():
            if "proj" in weight or "head" in weight:
                part = data[ref.offset // 4 : ref.end // 4]
                part += rng.normal(size=part.size).astype(np.float32) * 0.2 * part.std()
        data.flush()
        manifest["files"][f"{graph}.data"]["sha256"] = hash_file(bundle.data_file(name))
    (bundle.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    return Bundle.open(bundle.path)


def test_one_engine_serves_every_checkpoint_of_its_shapes(copied: Bundle, opened: Any) -> None:
    with opened(copied) as it:
        before = it.model.generate(PROMPT, OPTIONS).tokens
    other = fine_tuned(copied)
    record = json.loads((engine_folder(other, "rtx") / BUILD_FILE).read_text())
    assert record["holds"] == {}
    with opened(other) as it:
        after = it.model.generate(PROMPT, OPTIONS).tokens
    build_engines(other, "ort-cpu", builder_for("ort-cpu"))
    with TwoTower.open(other.path, target="ort-cpu") as model:
        expected = model.generate(PROMPT, OPTIONS).tokens
    assert after == expected
    assert after != before, "the weights differ enough to tell"


def test_engines_that_hold_weights_are_tied_to_their_checkpoint(tmp_path: Path) -> None:
    bundle = bundle_with_engines("hybrid-b", tmp_path / "b", experts="dense", weights="inside")
    record = json.loads((engine_folder(bundle, "rtx") / BUILD_FILE).read_text())
    assert all(part["weights"] == [] for parts in record["engines"].values() for part in parts)
    open_(bundle).close()
    with pytest.raises(EngineMismatchError, match="does not fit") as caught:
        open_(fine_tuned(bundle))
    assert "weights of another checkpoint" in caught.value.found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights[0].__setitem__(2, [1, 2, 3]), "expected float32 [1, 2, 3]"),
        (lambda weights: weights[0].__setitem__(1, "float16"), "expected float16"),
        (lambda weights: weights[0].__setitem__(0, "no.such"), "no.such is not in the bundle"),
        (lambda weights: weights.pop(0), "neither an input nor inside"),
    ],
)
def test_weights_the_program_was_not_made_for_are_named(
    copied: Bundle, change: Callable[[list[Any]], None], says: str
) -> None:
    file = engine_folder(copied, "rtx") / BUILD_FILE
    data = json.loads(file.read_text())
    change(data["engines"]["denoiser"][0]["weights"])
    file.write_text(json.dumps(data))
    with pytest.raises(EngineMismatchError, match="do not fit the weights") as caught:
        open_(copied)
    assert says in caught.value.found
    assert "twotower build" in caught.value.do


def test_an_engine_whose_inputs_are_not_the_recorded_weights_is_refused(copied: Bundle) -> None:
    """The file was exchanged: it reads weights of another shape than build.json says."""

    def reshape(engine: Any) -> None:
        shape = engine.get_tensor_shape
        engine.get_tensor_shape = lambda name: (*shape(name), 1)

    with pytest.raises(EngineMismatchError, match="is not the engine") as caught:
        open_(copied, engines_changed(reshape))
    assert "has shape" in caught.value.found


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data_files(bundle: Bundle) -> dict[str, Any]:
    """Of an old date: what changed a moment ago is not remembered as sound."""
    files = {name: r for name, r in bundle.files.items() if name.endswith(".data")}
    for name in files:
        os.utime(bundle.path / name, (1_700_000_000, 1_700_000_000))
    return files


@pytest.mark.usefixtures("own_cache")
def test_data_files_are_read_once_and_compared_on_their_way(copied: Bundle) -> None:
    files = data_files(copied)
    assert set(unverified_files(copied.path, files)) == set(files)
    open_(copied).close()
    flip_byte(copied.data_file("denoiser"))
    with pytest.raises(BundleError, match="has changed"):
        open_(copied)


def test_loading_is_told_apart_from_checking(copied: Bundle) -> None:
    checked: list[tuple[int, int]] = []
    loaded: list[tuple[int, int]] = []
    open_(
        copied,
        progress=lambda *step: checked.append(step),
        loading=lambda *step: loaded.append(step),
    ).close()
    weights = sum(ref.nbytes for name in GRAPH_FILES for ref in copied.weights(name).values())
    assert loaded[-1][0] == loaded[-1][1] >= weights
    assert all(total < weights for _, total in checked), "engines are programs without weights"


@pytest.mark.usefixtures("own_cache")
def test_a_file_nobody_reads_is_not_taken_for_sound(tmp_path: Path) -> None:
    """Engines that hold all weights read no data file, and so cannot vouch for one."""
    bundle = bundle_with_engines("hybrid-b", tmp_path / "b", experts="dense", weights="inside")
    files = data_files(bundle)
    open_(bundle).close()
    assert set(unverified_files(bundle.path, files)) == set(files)


@pytest.mark.usefixtures("own_cache")
def test_only_what_is_new_is_hashed_again(copied: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    files = data_files(copied)
    open_(copied).close()
    assert unverified_files(copied.path, files) == {}
    os.utime(copied.path / "denoiser/model.onnx.data", (1_700_000_001, 1_700_000_001))
    hashed: list[set[str]] = []
    load = WeightStore.load

    def watched(store: WeightStore, requests: Any, **options: Any) -> Any:
        hashed.append({r.file.parent.name for r in requests if options.get("hashed")})
        return load(store, requests, **options)

    monkeypatch.setattr(WeightStore, "load", watched)
    open_(copied).close()
    assert set.union(*hashed) == {"denoiser"}


def test_a_bundle_without_weights_is_refused_by_whoever_runs_it(copied: Bundle) -> None:
    manifest = json.loads((copied.path / MANIFEST_FILE).read_text())
    for graph in GRAPH_FILES.values():
        (copied.path / f"{graph}.data").unlink()
        del manifest["files"][f"{graph}.data"]
    manifest["requires"] = ["no-weights"]
    (copied.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="holds none"):
        open_(Bundle.open(copied.path))
    shutil.rmtree(engine_folder(copied, "rtx"))
    with pytest.raises(TwoTowerError):
        TwoTower.open(copied.path)
