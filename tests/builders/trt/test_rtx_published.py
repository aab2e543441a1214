"""Programs at published widths, read out of engines that are built without weights and without a GPU: launches and memory of a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.helpers.trt.execution import fake_kernels
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.bundle import EngineRecord
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, published_slice
from twotower.cli.engine_table import launch_facts
from twotower.config.model import ModelConfig, parse_model_config
from twotower.export import ExportConfig, export_programs
from twotower.planning import PlanOptions, plan_bundle
from twotower.tensorrt_library import variant_from_module

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.trt_rtx, pytest.mark.slow]

SLICE = parse_model_config(published_slice("ME*ME*"), "two published layers of every kind")
PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
MOST_KERNELS = {"denoise": 570, "block": 640}
"""Of the whole published towers."""

ONE_STREAM = {"streams": 1, "events": 1, "signals": 0, "waits": 0} | {
    "capturable": True,
    "expanded": [],
}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> EngineRecord:
    folder = tmp_path_factory.mktemp("published")
    bundle = export_programs(SLICE, folder / "bundle", ExportConfig(dtype="bfloat16"), name="slice")
    config = BuildConfig(sms=(89,), experts="dense")
    return build_engines(bundle, "rtx", builder_for("rtx"), config=config)


def programs(record: EngineRecord) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Graph, profile and program."""
    for graph, (engine,) in record.engines.items():
        for program in record.report["engines"][engine.file]["inspector"]["programs"]:
            yield graph, engine.profiles[program["profile"]].name, program


def in_all_layers(program: Mapping[str, Any], config: ModelConfig) -> int:
    """Kernels of a pass through a whole model: more layers of every kind; what layers share is in the first of them."""
    kernels, kinds = int(program["kernels"]), program["by_kind"]
    for kind in set(SLICE.layers):
        more = config.layers.count(kind) - SLICE.layers.count(kind)
        kernels += more * kinds.get(kind.name.lower(), {"min": 0})["min"]
    return kernels


def test_a_pass_of_the_published_towers_launches_no_more_than_it_must(record: EngineRecord) -> None:
    found = {name: in_all_layers(program, PUBLISHED) for _, name, program in programs(record)}
    assert found.keys() == {"prefill", "block", "decode", "head", "denoise"}
    assert {name: found[name] for name, most in MOST_KERNELS.items() if found[name] > most} == {}


def test_a_pass_uses_one_stream_that_can_be_captured_and_expands_no_weight(
    record: EngineRecord,
) -> None:
    for graph, name, program in programs(record):
        assert {key: program[key] for key in ONE_STREAM} == ONE_STREAM, (graph, name)


def test_activations_take_what_is_planned(record: EngineRecord) -> None:
    options = PlanOptions(target="rtx", dtype="bfloat16", expert_path="dense")
    planned = plan_bundle(SLICE, options).scratch
    off = {}
    for graph, name, program in programs(record):
        said = planned[graph].profiles[name]
        if program["scratch"] != pytest.approx(said, rel=0.1):
            off[name] = (program["scratch"], said)
    assert off == {}
    assert all(planned[graph].nbytes == max(planned[graph].profiles.values()) for graph in planned)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> EngineRecord:
    """The whole published towers as programs with experts between them; kernels are compiled by `make kernels`."""
    folder = tmp_path_factory.mktemp("cut")
    bundle = export_programs(
        PUBLISHED, folder / "bundle", ExportConfig(dtype="bfloat16"), name="published"
    )
    builder = TensorRTBuilder(variant_from_module(tensorrt_rtx), fake_kernels)
    return build_engines(bundle, "rtx", builder, config=BuildConfig(sms=(89,), experts="kernels"))


def test_programs_with_experts_between_launch_no_more_than_they_may(cut: EngineRecord) -> None:
    told = launch_facts(cut)
    passes = {name: facts for graph in told.values() for name, facts in graph.items()}
    for name, most in {"denoise": 610, "decode": 610, "block": 640}.items():
        assert passes[name]["kernels"] + passes[name]["experts"][-1] <= most
    assert told.keys() == {"context", "denoiser"}
    for graph in told:
        parts = cut.engines[graph]
        assert (len(parts), len({part.file for part in parts})) == (24, 4)
    assert sum(file.size for file in cut.files.values()) < 50e6


def test_a_boundary_costs_no_launch_of_its_own(cut: EngineRecord) -> None:
    """What experts gave is added where the next layer is normed, and the stream is handed over by the kernel that adds to it."""
    (program,) = cut.report["engines"][cut.engines["denoiser"][1].file]["inspector"]["programs"]
    kernels = {kind: counts["kernels"] for kind, counts in program["by_kind"].items()}
    assert kernels == {"mamba": 9, "moe": 5}
    assert {key: program[key] for key in ONE_STREAM} == ONE_STREAM


def test_programs_with_experts_between_take_what_is_planned(cut: EngineRecord) -> None:
    plan = plan_bundle(PUBLISHED, PlanOptions(target="rtx", sms=(89,)))
    found: dict[tuple[str, str], int] = {}
    for graph, parts in cut.engines.items():
        for part in parts:
            for program in cut.report["engines"][part.file]["inspector"]["programs"]:
                key = graph, part.profiles[program["profile"]].name
                found[key] = max(found.get(key, 0), program["scratch"])
    planned = {(graph, name): plan.scratch[graph].profiles[name] for graph, name in found}
    assert found == pytest.approx(planned, rel=0.1)
    assert len(found) == 5
    counts = Counter(part.file for parts in cut.engines.values() for part in parts)
    assert counts == {engine.name: engine.programs for engine in plan.engines}
    for engine in plan.engines:
        facts = cut.report["engines"][engine.name]
        assert cut.files[engine.name].size <= engine.engine_bytes
        assert facts["peak_memory"] <= (engine.build_peak_bytes or 0)
