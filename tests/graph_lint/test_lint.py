"""Every rule finds its injected fault and nothing else; legitimate forms have none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T

from tests.helpers.errors import fails
from tests.helpers.graph_faults import (
    FAULTS,
    FORMS,
    LEGITIMATE,
    attention,
    constant,
    model,
    node,
    one,
    quantized,
    value,
    zero,
)
from tests.helpers.source import CHECKPOINTS, ROOT
from twotower.builders.segment import fix_axes, layer_bytes, segment
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.model import parse_model_config, read_model_config
from twotower.errors import ExportError
from twotower.export.graphs.tower_graphs import build_graph
from twotower.graph_lint import RULES, Severity, explained, lint, require_clean, rules_table
from twotower.graph_lint.rules import OPERATORS
from twotower.spec import CONTEXT_HEAD, signatures

BY_ID = {rule.id: rule for rule in RULES}
DTYPES = ("float32", "float16", "bfloat16")
SIZES = {"T": 64, "S": 16}


def broken(made: onnx.ModelProto, *, fixed: bool = True) -> set[str]:
    return {finding.rule.id for finding in lint(made, fixed=fixed)}


def test_every_rule_has_an_injected_fault() -> None:
    assert list(FAULTS) == [rule.id for rule in RULES]


@pytest.mark.parametrize("rule", FAULTS)
def test_an_injected_fault_breaks_its_rule_alone_and_without_it_none_is_broken(rule: str) -> None:
    assert broken(FAULTS[rule](True)) == {rule}
    healthy = FAULTS[rule](False)
    onnx.checker.check_model(healthy, full_check=True)
    assert not broken(healthy)


def one_operator(domain: str, op_type: str) -> onnx.ModelProto:
    made = one("Sigmoid")
    made.graph.node[0].domain, made.graph.node[0].op_type = domain, op_type
    made.opset_import.append(onnx.helper.make_opsetid(domain or "other", 1))
    return made


def between(dtype: int) -> onnx.ModelProto:
    nodes = [node("Cast", ["x"], ["m"], to=dtype), node("Cast", ["m"], ["y"], to=T.FLOAT)]
    return model(nodes, [value("x", T.FLOAT, [4])], [value("y", T.FLOAT, [4])])


def cast_constant(number: float) -> onnx.ModelProto:
    """A number added to a mask's row, as it is often written."""
    nodes = [node("Cast", ["c"], ["h"], to=T.FLOAT16), node("Add", ["x", "h"], ["y"])]
    x, y = (value(name, T.FLOAT16, [4]) for name in "xy")
    return model(nodes, [x], [y], weights=[constant("c", np.float32(number))])


def no_product() -> onnx.ModelProto:
    """A product of what does not fit."""
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Sigmoid", ["m"], ["y"])]
    weights = [constant("w", np.ones((63, 64), np.float32))]
    return model(nodes, "x:FLOAT[4,64]", "y:FLOAT[4,64]", weights=weights)


VARIANTS: dict[str, tuple[str, Callable[[], onnx.ModelProto]]] = {
    **{name: (rule, partial(make, True)) for name, (rule, make) in FORMS.items()},
    "one of ONNX Runtime": ("refused-operators", lambda: one_operator("com.microsoft", "FastGelu")),
    "an operator nobody tried": ("known-operators", lambda: one_operator("", "Erf")),
    "no operator of ONNX": ("known-operators", lambda: one_operator("", "Rope")),
    "e5m2": ("known-types", lambda: quantized(zero(T.FLOAT8E5M2))),
    "a negative scale": ("quantized-scale", lambda: quantized(zero(), scale=-1.0)),
    "float64 inside": ("known-types", lambda: between(T.DOUBLE)),
    "uint8 inside": ("known-types", lambda: between(T.UINT8)),
    "a product that does not fit": ("known-types", no_product),
    "a cast beyond float16": ("finite-constants", lambda: cast_constant(-3.4e38)),
}
"""More forms of some faults: which rule, and the model."""


@pytest.mark.parametrize("name", VARIANTS)
def test_other_forms_of_a_fault(name: str) -> None:
    rule, make = VARIANTS[name]
    assert rule in broken(make())


def test_a_shape_that_is_read_may_become_a_constant() -> None:
    assert not broken(FORMS["a shape alone"][1](True), fixed=False)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_known_operator_is_written_by_the_recorder(name: str) -> None:
    folder = ROOT / "export" / "graphs"
    assert any(f'"{name}"' in file.read_text(encoding="utf-8") for file in folder.glob("*.py"))


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_forms_of_few_bits_are_not_complained_of(name: str) -> None:
    assert not broken(LEGITIMATE[name]())


def test_a_number_that_float16_holds_may_be_cast() -> None:
    assert not broken(cast_constant(-65504.0))


def recorded(checkpoint: str, dtype: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """(name, graph) of a checkpoint's graphs."""
    config = read_model_config(CHECKPOINTS[checkpoint] / "config.json")
    for name in signatures(config, dtype):
        yield name, ir.to_proto(build_graph(name, config, dtype).model)


def errors(made: onnx.ModelProto, *, fixed: bool) -> list[str]:
    return [str(f) for f in lint(made, fixed=fixed) if f.rule.severity is Severity.ERROR]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_exported_graphs_are_clean_whole_and_in_segments(checkpoint: str, dtype: str) -> None:
    config = read_model_config(CHECKPOINTS[checkpoint] / "config.json")
    for name, made in recorded(checkpoint, dtype):
        assert not errors(made, fixed=False)
        fix_axes(made, SIZES)
        assert not errors(made, fixed=True)
        if name == CONTEXT_HEAD:
            continue
        signature = signatures(config, dtype)[name].with_sizes(SIZES)
        count = len(layer_bytes(made).layers)
        for length in (1, 3):
            for first in range(0, count, length):
                part = segment(made, signature, (first, min(first + length, count)), dtype=dtype)
                assert not errors(part.model, fixed=True), (name, part.layers)


def test_half_precision_graphs_have_no_notes_either() -> None:
    assert not [f for dtype in DTYPES[1:] for _, made in recorded("a", dtype) for f in lint(made)]


def test_rules_on_types_see_every_value_of_an_exported_graph() -> None:
    """Or they would hold for want of types."""
    from twotower.graph_lint.view import UNKNOWN, GraphView

    for _, made in recorded("a", "bfloat16"):
        view, nodes = GraphView(made), made.graph.node
        assert not [o for n in nodes for o in n.output if view.dtype(o) == UNKNOWN]


def test_the_published_model_takes_no_time() -> None:
    config = parse_model_config(PUBLISHED_CONFIG, "the published config")
    for name in signatures(config, "bfloat16"):
        made = ir.to_proto(build_graph(name, config, "bfloat16").model)
        for fixed in (False, True):
            started = time.perf_counter()
            assert not lint(made, fixed=fixed)
            assert time.perf_counter() - started < 5, "it is far less on an idle machine"
            fix_axes(made, {"T": 4352, "S": 16})


def test_an_error_names_the_rule_the_place_the_reason_and_the_remedy() -> None:
    made = attention(is_causal=1, nonpad=True)
    made.graph.node[0].name = "layers.5.attention/Attention"
    rules = [BY_ID[rule] for rule in ("attention-causal", "attention-lengths")]
    said = [text for rule in rules for text in (rule.id, rule.reason, rule.instead)]
    with fails(ExportError, found=[*said, "layers.5.attention/Attention"], do="report it"):
        require_clean(made, "the graph", error=ExportError, do="report it")


def test_notes_are_returned() -> None:
    notes = require_clean(attention(T.FLOAT), "the graph", error=ExportError, do="nothing")
    assert [f.rule.id for f in notes] == ["attention-float32"]
    assert notes[0].to_json()["severity"] == "note"


def test_a_fault_of_every_layer_is_one_line() -> None:
    findings = lint(FAULTS["wide-exponentials"](True)) * 52
    (line,) = explained(findings)
    assert "and 47 more" in line


def test_the_document_shows_the_rules() -> None:
    text = (ROOT / "docs" / "graph-rules.md").read_text(encoding="utf-8")
    assert rules_table() in text


def test_rules_can_stand_in_a_table() -> None:
    for rule in RULES:
        cells = (rule.id, rule.subject, rule.avoid, rule.reason, rule.instead, rule.source)
        assert "|" not in "".join(cells)
    assert len(BY_ID) == len(RULES)


def test_the_model_is_not_changed() -> None:
    made = FAULTS["declared-types"](True)
    before = made.SerializeToString()
    lint(made)
    assert made.SerializeToString() == before
