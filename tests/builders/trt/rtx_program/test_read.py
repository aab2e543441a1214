"""Figures of a program are those its text states."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.rtx_program_text import Described, Launch, plan_of, program
from twotower.builders.trt.rtx_program.program import Program
from twotower.builders.trt.rtx_program.read import _weight_inputs, read_program_text, read_programs
from twotower.builders.trt.rtx_program.text import Statement
from twotower.config.model import read_model_config
from twotower.export.graphs.tower_graphs import build_graph
from twotower.spec import EXPERTS_OUT, RESIDUAL_IN, signatures

ROOT = Path(__file__).parents[4]


def read(**changes: object) -> Program:
    return read_program_text(program(**changes).text())


def test_kernels_are_told_with_their_nodes_and_tensors() -> None:
    made = read()
    product, after = made.kernels
    assert (product.operation, product.name) == ("fully_connected", "MatMul")
    assert product.nodes == ("layers.0.moe/MatMul",)
    assert product.is_product
    assert product.reads == ("tokens.1", "tower.layers.0.mixer.up.weight.1"), (
        "a view stands for what it views"
    )
    assert after.reads == ("h",), "a size is no tensor"
    assert not after.is_product
    assert (made.profile, made.sms, made.capturable) == (0, (89,), True)
    assert (made.streams, made.events) == (1, 1)
    assert (made.scratch, made.host) == (5120, 640)
    assert made.by_scope() == {"layers.0.moe": 2}
    assert not made.expanded
    assert not made.copied


def test_a_program_whose_shapes_are_all_fixed_works_out_none_on_the_host() -> None:
    """Engines for one row have no section of arithmetic on shapes."""
    text = program(inputs=["tokens.1", "tower.layers.0.mixer.up.weight.1"]).text()
    fixed = text[: text.index("shape_main {")].replace('"rows.1" ', "1 ")
    made = read_program_text(fixed.replace('"rows_shapeInput.1"', ""))
    assert len(made.kernels) == 2
    assert made.tensors["h"].dims == (1, 32)
    assert all(tensor.fixed for tensor in made.tensors.values())


def test_sizes_are_those_of_the_greatest_shapes() -> None:
    assert read(rows=8).tensors["h"].dims == (8, 32)
    assert read(rows=3).tensors["h"].nbytes == 3 * 32 * 2
    assert not read().tensors["h"].fixed


def test_sizes_are_worked_out_on_the_host_as_far_as_they_are_understood() -> None:
    host = (
        '  mul={ name="a" output={"doubled" } input={"rows_value" "c2" } stream=0  layers="" }',
        '  gt={ name="b" output={"many" } input={"rows_value" "c2" } stream=0  layers="" }',
        '  select={ name="c" output={"chosen" } input={"many" "doubled" "c2" } stream=0  layers="" }',
        '  hash={ name="d" output={"unknown" } input={"rows_value" } stream=0  layers="" }',
    )
    sizes = [Described(n, [1], "int64", "hmem") for n in ("doubled", "many", "chosen", "unknown")]
    tensors = [
        *sizes,
        Described("h", ["chosen", 32], "float", "scratch_0"),
        Described("y.1", ["unknown", 32], "int4", "scratch_1"),
        Described("z", [3, 5], "int4", "scratch_1"),
        Described("w", [3, 5], "posit8", "scratch_1"),
    ]
    launches = [Launch("__myl_Move", [], ["h", "y.1", "z", "w"])]
    found = read(tensors=tensors, launches=launches, host=host, rows=7, inputs=["tokens.1"]).tensors
    assert found["h"].nbytes == 14 * 32 * 4
    assert found["y.1"].dims == (None, 32)
    assert found["y.1"].nbytes is None
    assert found["z"].nbytes == 8
    assert found["w"].nbytes is None


def test_events_are_no_kernels() -> None:
    launches = [
        Launch("a", [], ["h"], ["layers.0.moe/Add"]),
        Launch("s", operation="signal"),
        Launch("w", operation="wait", stream=1),
        Launch("b", ["h"], ["y.1"], ["layers.0.moe/Mul"], stream=1),
    ]
    made = read(launches=launches, streams=2, capturable=0)
    assert (len(made.kernels), made.signals, made.waits) == (2, 1, 1)
    assert (made.streams, made.capturable) == (2, False)
    assert [k.stream for k in made.kernels] == [0, 1]


def test_a_statement_of_an_unknown_kind_that_computes_is_a_kernel() -> None:
    made = read(launches=[Launch("sorted", ["tokens.1"], ["y.1"], operation="bitonic_sort")])
    assert [k.operation for k in made.kernels] == ["bitonic_sort"]


def test_an_output_that_the_compiler_named_tells_no_profile() -> None:
    """A residual stream that a program both hands over and reads on itself has such a name."""
    mark = " [profile 1]"
    given, outputs = f"tokens{mark}.1", ["__mye30868", f"y{mark}.1"]
    tensors = [Described(name, [8]) for name in (given, *outputs)]
    launch = Launch(f"__myl_Add{mark}", [given], outputs, [f"layers.0.moe/Add{mark}"])
    made = read(inputs=[given], tensors=tensors, launches=[launch], outputs=outputs)
    assert made.profile == 1


def test_programs_come_in_the_order_of_their_profiles() -> None:
    def of(profile: int) -> str:
        mark = f" [profile {profile}]" if profile else ""
        given, made = [f"tokens{mark}.1"], [f"y{mark}.1"]
        tensors = [Described(name, [4]) for name in given + made]
        launch = Launch(f"__myl_Add{mark}", given, made, [f"layers.0.moe/Add{mark}"])
        launches = [launch] * (profile + 1)
        return program(inputs=given, outputs=made, tensors=tensors, launches=launches).text()

    programs = read_programs(plan_of(of(2), of(0), of(1)))
    assert [(p.profile, len(p.kernels)) for p in programs] == [(0, 1), (1, 2), (2, 3)]
    assert {k.nodes for p in programs for k in p.kernels} == {("layers.0.moe/Add",)}
    assert programs[2].kernels[0].name == "__myl_Add"


@pytest.mark.parametrize("graph", ["context", "context_head", "denoiser"])
def test_inputs_of_our_graphs_are_data_and_everything_else_is_a_weight(graph: str) -> None:
    config = read_model_config(ROOT / "assets/twotower-tiny/config.json")
    inputs = signatures(config, "bfloat16")[graph].inputs
    data = [*(spec.name for spec in inputs), RESIDUAL_IN, EXPERTS_OUT]
    weights = [weight.name for weight in build_graph(graph, config, "bfloat16").weights]
    # The compiler names an input by its output where both share memory.
    names = [name.replace("past_key_values", "present") for name in data] + data + weights
    listed = "  inputs={ " + " ".join(f'"{name}.1"' for name in names) + " }"
    assert _weight_inputs(Statement("header", listed)) == frozenset(weights)
