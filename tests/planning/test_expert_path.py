"""What a plan takes for granted of experts is what a build cuts, compiles and allocates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.published import PUBLISHED, RECIPES, of_layers, saved_graph
from tests.helpers.source import ROOT
from twotower.builders.expert_cut import ExpertCut
from twotower.bundle import EngineFile
from twotower.config.model import ModelConfig, read_model_config
from twotower.errors import ConfigError
from twotower.kernels import scratch_bytes
from twotower.kernels.shape import shape_of
from twotower.planning import PlanOptions, plan_bundle
from twotower.planning.engines import program_layers
from twotower.planning.expert_path import expert_path, expert_step, on_gpus, outside_engines
from twotower.planning.working_memory import expert_room, tower_scratch
from twotower.runtime.engines.handover import buffer_sizes
from twotower.spec import CONTEXT, DENOISER, signatures

KERNELS = PlanOptions(target="rtx")
CUDA = PlanOptions(target="ort-cuda")
SMALL = read_model_config(ROOT / "tests/fixtures/hybrid-a/config.json")
TINY = read_model_config(ROOT / "assets/twotower-tiny/config.json")


def options_of(recipe: str) -> PlanOptions:
    made = RECIPES[recipe]
    return replace(
        KERNELS,
        dtype="bfloat16",
        formats=tuple(sorted(made.weights.items())),
        rounded=tuple(sorted(made.activations)),
    )


def cut_towers(folder: Path, config: ModelConfig, recipe: str) -> Iterator[ExpertCut]:
    """Both towers' graphs as an export writes them, cut as a build cuts them."""
    for graph in (CONTEXT, DENOISER):
        model = saved_graph(folder / f"{graph}.onnx", config, graph, recipe)
        yield ExpertCut(model, signatures(config, "bfloat16")[graph], config, dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "name", "why"),
    [
        (KERNELS, "kernels", ""),
        (PlanOptions(target="trt", dtype="float32", experts="nvfp4"), "kernels", ""),
        (PlanOptions(max_batch=16), "kernels", ""),
        (PlanOptions(max_batch=17), "dense", "at most 4096"),
        (PlanOptions(dtype="float16", sms=(75, 89)), "dense", "SM 75"),
        (on_gpus(PlanOptions(target="trt", dtype="float16"), [75]), "dense", "SM 75"),
        (on_gpus(PlanOptions(target="trt"), [0, 90]), "kernels", ""),
        (PlanOptions(expert_path="dense"), "dense", "--expert-path dense"),
        (PlanOptions(target="ort-cuda"), "fused", ""),
        (PlanOptions(target="ort-cuda", max_batch=64, experts="int4"), "fused", ""),
        (replace(CUDA, experts="fp8"), "dense", "QMoE does not compute experts in this format"),
        (replace(CUDA, dtype="float32", experts="int8"), "dense", "no CUDA kernel for float32"),
        (replace(CUDA, expert_path="dense"), "dense", "--expert-path dense"),
        (replace(CUDA, expert_path="kernels", experts="nvfp4", sms=(90,)), "kernels", ""),
        (PlanOptions(target="ort-cpu"), "chosen", ""),
        (PlanOptions(target="ort-cpu", expert_path="dense"), "dense", "--expert-path dense"),
    ],
)
def test_what_computes_the_experts(options: PlanOptions, name: str, why: str) -> None:
    found = expert_path(PUBLISHED, options)
    assert found.name == name
    assert why in found.why
    assert bool(found.why) == (name == "dense")
    assert (outside_engines(PUBLISHED, options) != ()) == (name == "kernels")


def test_a_model_without_experts_has_none_to_compute() -> None:
    plan = plan_bundle(of_layers("M*M"), KERNELS)
    assert (plan.experts.name, plan.dense, len(plan.engines)) == ("", {}, 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kernels_are_those_a_build_compiles(tmp_path: Path, recipe: str) -> None:
    for cut in cut_towers(tmp_path, TINY, recipe):
        planned = shape_of(expert_step(TINY, options_of(recipe)))
        assert {shape_of(cut.experts(number)) for number in range(cut.programs - 1)} == {planned}


def test_room_is_what_the_runtime_allocates(tmp_path: Path) -> None:
    sizes, rows = {"B": 3, "L": 256}, 3
    wanted: dict[str, tuple[int, int]] = {}
    for cut in cut_towers(tmp_path, SMALL, "float"):
        made = [cut.program(number) for number in range(cut.programs)]
        programs = [EngineFile("", m.layers, m.inputs, m.outputs, ()) for m in made]
        for name, (count, nbytes) in buffer_sizes(programs, sizes | {"S": 16, "T": 320}).items():
            wanted[name] = (count, max(nbytes, wanted.get(name, (0, 0))[1]))
        layers = [m.layers for m in made]
        assert [first for first, _ in layers] == [first for first, _ in program_layers(SMALL)]
    room = expert_room(SMALL, replace(options_of("float"), max_batch=rows))
    assert room.handed == sum(count * nbytes for count, nbytes in wanted.values())
    shape = shape_of(expert_step(SMALL, options_of("float")))
    assert room.workspace == scratch_bytes(shape, rows * 256)
    assert expert_room(SMALL, replace(KERNELS, expert_path="dense")).handed == 0


def test_programs_keep_no_expert_s_results() -> None:
    """Nothing of E rows a token is written; a prompt's chunk takes a fifth of the memory."""
    kernels, dense = (
        tower_scratch(PUBLISHED, replace(KERNELS, expert_path=path)) for path in ("auto", "dense")
    )
    assert kernels[CONTEXT].nbytes < 0.2 * dense[CONTEXT].nbytes
    assert "experts" not in kernels[CONTEXT].because
    assert kernels[DENOISER].nbytes < dense[DENOISER].nbytes
    few = replace(KERNELS, formats=(("routed_expert", "int8"),))
    assert tower_scratch(PUBLISHED, few) == kernels, "no expert is expanded"
    expanded = tower_scratch(PUBLISHED, replace(few, expert_path="dense"))
    assert expanded[DENOISER].nbytes > dense[DENOISER].nbytes


def test_equal_programs_are_one_file() -> None:
    plan = plan_bundle(PUBLISHED, KERNELS)
    files = {"context_head.engine": 1}
    for graph in (CONTEXT, DENOISER):
        files |= {f"{graph}.{n}.engine": count for n, count in enumerate((1, 16, 6, 1))}
    assert {e.name: e.programs for e in plan.engines} == files
    assert sum(e.weight_bytes for e in plan.engines) == sum(w.total for w in plan.weights.values())
    assert plan.devices[0].weights == sum(w.total for w in plan.weights.values())
    assert plan.build_peak < 0.5e9


def test_sessions_between_experts_have_memory_of_their_own() -> None:
    """ONNX Runtime: 24 programs a tower keep what each needs; the kernels have theirs besides."""
    kernels = PlanOptions(target="ort-cuda", expert_path="kernels", sms=(90,))
    plan, rtx = (plan_bundle(PUBLISHED, o) for o in (kernels, replace(KERNELS, target="trt")))
    assert len(plan.engines) == 49
    assert sum(e.weight_bytes for e in plan.engines) == sum(w.total for w in plan.weights.values())
    assert 18 < plan.scratch[CONTEXT].nbytes / rtx.scratch[CONTEXT].nbytes < 24
    towers = sum(s.nbytes for s in plan.scratch.values())
    assert plan.devices[0].scratch == towers + plan.room.workspace + plan.room.handed
    assert rtx.devices[0].scratch == rtx.scratch[CONTEXT].nbytes + rtx.room.handed
    assert (plan.held, plan.build_seconds) == (0, None)
    assert plan.passes == rtx.passes
    with pytest.raises(ConfigError, match="ort-cuda"):
        plan_bundle(PUBLISHED, replace(kernels, expert_path="auto"))


def test_experts_in_few_bits_are_in_no_engine() -> None:
    plan = plan_bundle(PUBLISHED, replace(KERNELS, experts="int4"))
    assert plan.held == plan.disk.copies["rtx"] == plan.disk.copies["trt"] == 0
    assert plan.disk.engines["rtx"] < 1e8
    assert plan.build_peak < 0.5e9
    formats = tuple(sorted(RECIPES["mixed"].weights.items()))
    mixed = plan_bundle(PUBLISHED, replace(KERNELS, formats=formats))
    assert 0 < mixed.held < 4e9, "Mamba, attention and heads are"
    assert len(mixed.engines) == 49, "programs that hold weights of their own share no file"
    weights = sum(w.total for w in mixed.weights.values())
    assert sum(e.weight_bytes for e in mixed.engines) == weights
