"""Programs at published widths, read out of engines that are built without weights and without a GPU: launches and memory of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.bundle import EngineRecord
from twotower.config.model import ModelConfig, parse_model_config
from twotower.export import ExportConfig, export_programs
from twotower.export.synthetic import PUBLISHED_CONFIG, published_slice
from twotower.planning import PlanOptions, plan_bundle

pytestmark = [pytest.mark.trt_rtx, pytest.mark.slow]

SLICE = parse_model_config(published_slice("ME*ME*"), "two published layers of every kind")
PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
MOST_KERNELS = {"denoise": 570, "block": 640}
"""Of the whole published towers."""


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> EngineRecord:
    folder = tmp_path_factory.mktemp("published")
    bundle = export_programs(SLICE, folder / "bundle", ExportConfig(dtype="bfloat16"), name="slice")
    return build_engines(bundle, "rtx", builder_for("rtx"), config=BuildConfig(sms=(89,)))


def programs(record: EngineRecord) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Graph, profile and program."""
    for graph, (engine,) in record.engines.items():
        for program in record.report["engines"][engine.file]["inspector"]["programs"]:
            yield graph, engine.profiles[program["profile"]].name, program


def in_all_layers(program: Mapping[str, Any], config: ModelConfig) -> int:
    """Kernels of a pass through a whole model: more layers of every kind; what layers share is in the first of them."""
    more = {kind.name.lower(): config.layers.count(kind) - SLICE.layers.count(kind) for kind in set(SLICE.layers)}
    kinds = program["by_kind"]
    return int(program["kernels"]) + sum(count * kinds[kind]["min"] for kind, count in more.items() if kind in kinds)


def test_a_pass_of_the_published_towers_launches_no_more_than_it_must(record: EngineRecord) -> None:
    found = {name: in_all_layers(program, PUBLISHED) for _, name, program in programs(record)}
    assert found.keys() == {"prefill", "block", "decode", "head", "denoise"}
    assert {name: found[name] for name, most in MOST_KERNELS.items() if found[name] > most} == {}


def test_a_pass_uses_one_stream_that_can_be_captured_and_expands_no_weight(record: EngineRecord) -> None:
    for graph, name, program in programs(record):
        told = {key: program[key] for key in ("streams", "events", "signals", "waits", "capturable", "expanded")}
        assert told == {"streams": 1, "events": 1, "signals": 0, "waits": 0, "capturable": True, "expanded": []}, (graph, name)


def test_activations_take_what_is_planned(record: EngineRecord) -> None:
    planned = plan_bundle(SLICE, PlanOptions(target="rtx", dtype="bfloat16")).scratch
    off = {}
    for graph, name, program in programs(record):
        said = planned[graph].profiles[name]
        if program["scratch"] != pytest.approx(said, rel=0.1):
            off[name] = (program["scratch"], said)
    assert off == {}
    assert all(planned[graph].nbytes == max(planned[graph].profiles.values()) for graph in planned)
