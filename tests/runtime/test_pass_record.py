"""Pass times kept in a bundle: used by the engines, library and machine they are of alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import built_fixture
from twotower.config import GenerationConfig
from twotower.runtime import TwoTower
from twotower.runtime.auto import PassRecord, PassTimes, Setting
from twotower.runtime.pass_times import RECORD_FILE, read_pass_record

HERE = {"target": "ort-cpu", "processor": "this", "library": "1.2", "gpus": []}
TIMES = PassTimes(denoise_ms=3.0, extend_ms=2.0, step_ms=1.0)
RECORD = PassRecord(HERE, {16: {1: TIMES, 8: TIMES}}, {Setting(0.9, 16, 16): (4.5, 20)})


def write(folder: Path, record: dict[str, Any]) -> None:
    (folder / "reports").mkdir(exist_ok=True)
    (folder / RECORD_FILE).write_text(json.dumps({"budget": 98.7, "auto": record}))


def test_it_reads_back(tmp_path: Path) -> None:
    assert read_pass_record(tmp_path, HERE) is None
    write(tmp_path, RECORD.to_json())
    assert read_pass_record(tmp_path, HERE) == RECORD


@pytest.mark.parametrize("key", HERE)
def test_one_of_something_else_is_ignored(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, RECORD.to_json())
    with caplog.at_level("INFO"):
        assert read_pass_record(tmp_path, {**HERE, key: "another"}) is None
    assert f"another {key} are ignored" in caplog.text


@pytest.mark.parametrize(
    "harm",
    [
        lambda r: r.clear(),
        lambda r: r.update(measured_on=None),
        lambda r: r["times"][0].update(denoise_ms=0),
        lambda r: r["times"][0].update(step_ms="fast"),
        lambda r: r["times"][0].pop("rows"),
        lambda r: r["passes"][0].update(passes_per_block=-1),
        lambda r: r.update(passes=5),
    ],
)
def test_a_damaged_one_is_ignored(
    tmp_path: Path, harm: Callable[[dict[str, Any]], None], caplog: pytest.LogCaptureFixture
) -> None:
    record = RECORD.to_json()
    harm(record)
    write(tmp_path, record)
    with caplog.at_level("INFO"):
        assert read_pass_record(tmp_path, HERE) is None
    assert "no pass times that can be read" in caplog.text


def test_a_report_of_an_older_version_or_no_json_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    for text in ('{"budget": 98.7}', "[]", "{"):
        (tmp_path / RECORD_FILE).write_text(text)
        assert read_pass_record(tmp_path, HERE) is None


def test_a_session_measures_writes_and_takes_its_own(tmp_path: Path) -> None:
    bundle = built_fixture("hybrid-a", tmp_path / "b")
    config = GenerationConfig(mode="auto", max_new_tokens=20, ignore_eos=True)
    with TwoTower.open(bundle.path, "ort-cpu", max_batch=3) as model:
        record = model.pass_record()
    (by_rows,) = record.times.values()
    assert list(by_rows) == [1, 2, 3]
    assert record.measured_on["target"] == "ort-cpu"
    fast = PassTimes(denoise_ms=100.0, extend_ms=1.0, step_ms=1.0)
    slow = PassTimes(denoise_ms=1.0, extend_ms=1.0, step_ms=100.0)
    for times, mode in ((fast, "ar"), (slow, "diffusion")):
        write(bundle.path, replace(record, times={16: {1: times}}).to_json())
        with TwoTower.open(bundle.path, "ort-cpu") as model:
            assert model.generate([5, 6], config).mode == mode
        with TwoTower.open(bundle.path, "ort-cpu", threads=7) as model:
            # Of other threads: measured here, by what a pass takes in truth.
            assert model._auto.times(1, 16) not in (fast, slow)
