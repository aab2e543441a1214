"""Traces: what is recorded was run, what is written reads back, what is damaged is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_engines import fake_towers
from twotower.config import GenerationConfig
from twotower.errors import TraceError
from twotower.runtime import StepRecord, TwoTower
from twotower.trace import Trace, read_trace, record_trace, write_trace

CONFIG = GenerationConfig(max_new_tokens=40, confidence_threshold=0.6, ignore_eos=True)


@pytest.fixture
def model() -> Iterator[TwoTower]:
    with TwoTower.from_towers(fake_towers().towers) as opened:
        yield opened


@pytest.fixture
def trace(model: TwoTower) -> Trace:
    return record_trace(model, [5, 6, 7], CONFIG, bundle="toy")


@pytest.fixture
def file(trace: Trace, tmp_path: Path) -> Path:
    write_trace(tmp_path / "t.jsonl", trace)
    return tmp_path / "t.jsonl"


def test_every_pass_is_there_as_the_runtime_reported_it(model: TwoTower, trace: Trace) -> None:
    records: list[StepRecord] = []
    result = model.generate([5, 6, 7], CONFIG, on_step=records.append)
    assert len(trace.steps) == len(records) == result.usage.nfe
    for step, record in zip(trace.steps, records, strict=True):
        assert (step.block, step.step) == (record.block_index, record.step)
        assert step.tokens == record.block_in[0].tolist()
        assert step.next == record.next_block[0].tolist()
        assert step.predicted == record.predicted[0].tolist()
        assert step.confidence == pytest.approx(record.confidence[0].tolist(), abs=1e-6)
        mask, pairs = model.config.mask_token_id, zip(step.tokens, step.next, strict=True)
        assert step.committed == [i for i, (a, b) in enumerate(pairs) if a == mask != b]
        assert step.t == pytest.approx(sum(t == mask for t in step.tokens) / 16)
        assert step.denoise_ms >= 0
    assert trace.end.tokens == list(result.tokens)
    assert [b.block for b in trace.blocks] == [0, 1, 2]
    assert [b.extend_ms is None for b in trace.blocks] == [False, False, True]
    assert [t for b in trace.blocks for t in b.tokens][: len(result.tokens)] == list(result.tokens)


def test_a_sampled_trace_tells_the_seed_that_makes_it_again(model: TwoTower) -> None:
    hot = replace(CONFIG, temperature=2.0)
    first = record_trace(model, [5, 6, 7], hot)
    seed = first.header.config["seed"]
    assert isinstance(seed, int)
    again = record_trace(model, [5, 6, 7], GenerationConfig.from_mapping(first.header.config))
    assert again.end.tokens == first.end.tokens
    assert record_trace(model, [5, 6, 7], hot).header.config["seed"] != seed
    assert record_trace(model, [5, 6, 7], replace(hot, seed=4)).header.config["seed"] == 4


def test_the_times_of_the_parts_are_those_of_the_whole(tiny_bundle: Path) -> None:
    with TwoTower.open(tiny_bundle) as model:
        trace = record_trace(model, "Q: write from Ann to Omar: green kite, Kyoto, Friday, owl\nA:")
    parts = sum(s.denoise_ms for s in trace.steps)
    assert 0.5 * trace.end.timings_ms["denoise"] < parts <= trace.end.timings_ms["denoise"] + 0.5
    assert trace.has_text
    assert "".join(trace.piece(t) for t in trace.end.tokens) == trace.end.text


def test_a_watcher_sees_every_pass_as_it_comes(model: TwoTower, trace: Trace) -> None:
    seen: list[Any] = []
    record_trace(model, [5, 6, 7], CONFIG, watch=seen.append)
    timeless = [[replace(s, denoise_ms=0.0) for s in steps] for steps in (seen, trace.steps)]
    assert timeless[0] == timeless[1]


def test_autoregression_has_no_passes_to_trace(model: TwoTower) -> None:
    for mode in ("ar", "auto"):
        with pytest.raises(TraceError, match=f"mode '{mode}'"):
            record_trace(model, [5], GenerationConfig(mode=mode))


def test_what_is_written_reads_back(trace: Trace, file: Path) -> None:
    assert read_trace(file) == trace
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert (lines[0]["schema"], lines[0]["kind"]) == (1, "twotower-trace")
    assert [x["type"] for x in lines[1:]].count("block") == len(trace.blocks)
    assert lines[-1]["type"] == "end"
    assert not list(file.parent.glob(".*"))


def edited(number: int, old: str, new: str) -> Callable[[list[str]], list[str]]:
    """Replaces text of a line, numbered from 0."""
    return lambda lines: [*lines[:number], lines[number].replace(old, new), *lines[number + 1 :]]


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (edited(0, '"schema": 1', '"schema": 0'), "another schema"),
        (lambda lines: lines[:-1], "truncated"),
        (lambda lines: [*lines[:3], lines[3][: len(lines[3]) // 2], *lines[4:]], "line 4"),
        (lambda lines: [*lines[:2], "[1, 2]", *lines[3:]], "line 3"),
        (edited(1, '"predicted"', '"guessed"'), "line 2"),
        (edited(1, '"t": 1.0', '"t": NaN'), "line 2"),
        (edited(1, '"tokens": [', '"tokens": [-'), "line 2"),
        (edited(1, '"step": 0', '"step": 1'), "line 2"),
        (edited(2, '"step": 1', '"step": 0'), "line 3"),
        (lambda lines: ['{"kind": "diary"}'], "not a trace"),
        (lambda lines: [], "not a trace"),
    ],
)
def test_damaged_files_are_refused(file: Path, edit: Any, what: str) -> None:
    lines = file.read_text().splitlines()
    changed = edit(lines)
    assert changed != lines
    file.write_text("\n".join(changed))
    with pytest.raises(TraceError) as caught:
        read_trace(file)
    assert what in str(caught.value)
    assert caught.value.do
    if what == "another schema":
        assert "schema 0" in caught.value.found
        assert "reads schema 1" in caught.value.found
