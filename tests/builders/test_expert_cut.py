"""A tower cut at its experts computes what the whole tower computes, and equal programs of it are equal to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.errors import fails
from tests.helpers.graph_runs import SIZES, random_inputs, run_graph
from tests.helpers.reference_experts import reference_experts
from twotower.builders.expert_cut import ExpertCut, common_form
from twotower.builders.segment import fix_axes
from twotower.builders.weight_inputs import place_weights
from twotower.bundle import Bundle, ExpertsStep
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, published_slice
from twotower.config import ModelConfig
from twotower.config.model import parse_model_config
from twotower.errors import BuildError
from twotower.export import ExportConfig, export_programs
from twotower.spec import (
    CONDITIONING,
    CONTEXT,
    DENOISER,
    EXPERTS_IN,
    EXPERTS_OUT,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    SHARES,
)
from twotower.weights.external import load_graph, weight_refs
from twotower.weights.mapped import read_weight

FIXED = {"T": SIZES["T"], "S": SIZES["S"]}
HANDED = {CONDITIONING, RESIDUAL_OUT, EXPERTS_IN, SHARES}


def cut_of(bundle: Bundle, graph: str) -> ExpertCut:
    model = load_graph(bundle.graph_file(graph))
    fix_axes(model, FIXED)
    return ExpertCut(
        model, bundle.signatures[graph].with_sizes(FIXED), bundle.config, dtype=bundle.dtype
    )


def weights_of(bundle: Bundle, graph: str, step: ExpertsStep) -> dict[str, np.ndarray[Any, Any]]:
    data = np.memmap(bundle.data_file(graph), np.uint8, mode="r")
    return {
        role: read_weight(data, bundle.weights(graph)[spec.name])
        for role, spec in step.weights.items()
    }


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
def test_programs_with_experts_between_are_the_tower(hybrid: Bundle, graph: str) -> None:
    file = hybrid.graph_file(graph)
    whole = load_graph(file)
    fix_axes(whole, FIXED)
    inputs = random_inputs(
        hybrid.signatures[graph].with_sizes(FIXED).inputs, hybrid.config.vocab_size
    )
    expected = run_graph(whole, file.parent, inputs)

    cut = cut_of(hybrid, graph)
    assert cut.programs == hybrid.config.pattern.count("E") + 1
    results: dict[str, Any] = {}
    for number in range(cut.programs):
        part = cut.program(number)
        made = run_graph(part.model, file.parent, inputs)
        assert [o.name for o in part.outputs] == list(made)
        results |= {name: value for name, value in made.items() if name not in HANDED}
        if number == cut.programs - 1:
            continue
        inputs |= {RESIDUAL_IN: made[RESIDUAL_OUT]} | {
            k: v for k, v in made.items() if k == CONDITIONING
        }
        step, x = cut.experts(number), made[EXPERTS_IN]
        assert (np.count_nonzero(made[SHARES], axis=0) == step.top).all()
        out = reference_experts(
            step, x.reshape(-1, step.hidden), made[SHARES], weights_of(hybrid, graph, step)
        )
        inputs[EXPERTS_OUT] = out.reshape(x.shape)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
def test_no_program_reads_experts_and_every_other_weight_is_read(
    hybrid: Bundle, graph: str
) -> None:
    """By one program; a layer's table of shifts and gates is read before its experts and after them."""
    cut = cut_of(hybrid, graph)
    read = [
        name for number in range(cut.programs) for name in weight_refs(cut.program(number).model)
    ]
    experts = [
        spec.name
        for number in range(cut.programs - 1)
        for spec in cut.experts(number).weights.values()
    ]
    assert not set(read) & set(experts)
    assert {*read, *experts} == set(hybrid.weights(graph))
    assert len(set(experts)) == len(experts) == 4 * (cut.programs - 1)
    twice = {name for name in read if read.count(name) > 1}
    layers = {str(i) for i, kind in enumerate(hybrid.config.pattern) if kind == "E"}
    tables = {name for name in read if name.startswith("scale_shift_tables.")}
    assert twice == {name for name in tables if name.rpartition(".")[2] in layers}


def common_forms(
    config: ModelConfig, folder: Path, graph: str
) -> Iterator[tuple[bytes, dict[str, str]]]:
    bundle = export_programs(
        config, folder / "bundle", ExportConfig(dtype="bfloat16"), name="slice"
    )
    cut = cut_of(bundle, graph)
    for number in range(cut.programs):
        made = cut.program(number)
        place_weights(made.model, "inputs")
        model, names = common_form(made.model, max(made.layers[0] - 1, 0))
        yield model.SerializeToString(), names


@pytest.mark.slow
@pytest.mark.parametrize("graph", [CONTEXT, DENOISER])
def test_equal_programs_are_equal_to_the_byte(tmp_path: Path, graph: str) -> None:
    """The published towers have 24 programs of four kinds: the first, the last, and those with and without attention."""
    config = parse_model_config(PUBLISHED_CONFIG, "published")
    forms = list(common_forms(config, tmp_path, graph))
    assert len(forms) == 24
    kinds = [list(dict.fromkeys(model for model, _ in forms)).index(model) for model, _ in forms]
    between = config.pattern.split("E")[1:-1]
    ways = list(dict.fromkeys(between))
    assert kinds == [0, *(1 + ways.index(layers) for layers in between), 1 + len(ways)]
    assert len(set(kinds)) == 4
    for model, names in forms:
        assert len(set(names.values())) == len(names)
        assert b"layers.51." not in model


def test_the_published_programs_end_with_the_routing(tmp_path: Path) -> None:
    bundle = export_programs(
        parse_model_config(published_slice("ME*EE"), "slice"),
        tmp_path / "bundle",
        ExportConfig(dtype="bfloat16"),
        name="slice",
    )
    cut = cut_of(bundle, DENOISER)
    first, second, third, last = (cut.program(number) for number in range(4))
    assert [p.layers for p in (first, second, third, last)] == [(0, 1), (2, 3), (4, 4), (5, 5)]
    assert {s.name for s in first.outputs} == {RESIDUAL_OUT, EXPERTS_IN, SHARES, CONDITIONING}
    assert {s.name for s in third.inputs} == {RESIDUAL_IN, EXPERTS_OUT, CONDITIONING}
    assert {s.name for s in last.outputs} == {s.name for s in bundle.signatures[DENOISER].outputs}
    shares = next(s for s in second.outputs if s.name == SHARES)
    assert (shares.dtype, shares.axes) == ("float32", (128, "N"))
    step = cut.experts(2)
    sizes = (step.hidden, step.width, step.experts, step.top, step.shared_intermediate)
    assert (step.layer, *sizes) == (4, 2688, 1856, 128, 6, 3712)
    assert ExpertsStep.from_json(step.to_json()) == step


def test_a_graph_of_an_earlier_export_is_refused(hybrid: Bundle) -> None:
    model = load_graph(hybrid.graph_file(CONTEXT))
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("/experts_in", "_x") for name in names]
    with fails(BuildError, "cannot be cut at its experts"):
        ExpertCut(model, hybrid.signatures[CONTEXT], hybrid.config, dtype="float32")
