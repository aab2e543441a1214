"""Every rule finds its injected fault and nothing else; legitimate forms have none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto as T

from tests.helpers.errors import fails
from tests.helpers.graph_faults import (
    ALSO,
    FAULTS,
    LEGITIMATE,
    activations_in_four_bits,
    attention,
    cache,
    constant,
    model,
    node,
    one,
    quantized,
    two,
    value,
)
from tests.helpers.source import CHECKPOINTS, ROOT
from twotower.builders.segment import fix_axes, layer_bytes, segment
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG
from twotower.config.model import parse_model_config, read_model_config
from twotower.errors import ExportError
from twotower.export.graphs.tower_graphs import build_graph
from twotower.graph_lint import RULES, Severity, explained, lint, require_clean, rules_table
from twotower.spec import CONTEXT_HEAD, signatures

BY_ID = {rule.id: rule for rule in RULES}
DTYPES = ("float32", "float16", "bfloat16")
SIZES = {"T": 64, "S": 16}


def broken(made: onnx.ModelProto, *, fixed: bool = True) -> set[str]:
    return {finding.rule.id for finding in lint(made, fixed=fixed)}


def test_every_rule_has_an_injected_fault() -> None:
    assert list(FAULTS) == [rule.id for rule in RULES]
    assert set(ALSO) <= set(FAULTS)


@pytest.mark.parametrize("rule", FAULTS)
def test_an_injected_fault_breaks_its_rule_alone_and_without_it_none_is_broken(rule: str) -> None:
    assert broken(FAULTS[rule](True)) == {rule} | ALSO.get(rule, set())
    healthy = FAULTS[rule](False)
    onnx.checker.check_model(healthy, full_check=True)
    assert not broken(healthy)
    if BY_ID[rule].built_only:
        assert not broken(FAULTS[rule](True), fixed=False)


def computed_k() -> onnx.ModelProto:
    made = FAULTS["topk-limit"](False)
    made.graph.initializer.pop()
    made.graph.input.append(value("k", T.INT64, [1]))
    return made


def foreign(domain: str, op_type: str) -> onnx.ModelProto:
    made = one("Sigmoid")
    made.graph.node[0].domain, made.graph.node[0].op_type = domain, op_type
    made.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    return made


def between(dtype: int) -> onnx.ModelProto:
    nodes = [node("Cast", ["x"], ["m"], to=dtype), node("Cast", ["m"], ["y"], to=T.FLOAT)]
    return model(nodes, [value("x", T.FLOAT, [4])], [value("y", T.FLOAT, [4])])


def cast_constant(number: float) -> onnx.ModelProto:
    """A number added to a mask's row, as it is often written."""
    nodes = [node("Cast", ["c"], ["h"], to=T.FLOAT16), node("Add", ["x", "h"], ["y"])]
    x, y = (value(name, T.FLOAT16, [4]) for name in "xy")
    return model(nodes, [x], [y], weights=[constant("c", np.float32(number))])


def behind_identity() -> onnx.ModelProto:
    made = FAULTS["cache-is-input"](True)
    made.graph.node[0].op_type = "Identity"
    return made


def zero(kind: int) -> onnx.TensorProto:
    return onnx.helper.make_tensor("z", kind, [], [0])


VARIANTS: dict[str, tuple[str, Callable[[], onnx.ModelProto]]] = {
    "a computed k": ("topk-limit", computed_k),
    "query wider than key": ("attention-types", lambda: attention(T.FLOAT, key=T.FLOAT16)),
    "is_causal beside a mask": ("attention-causal", lambda: attention(is_causal=1)),
    "an operator of ONNX Runtime": (
        "standard-operators",
        lambda: foreign("com.microsoft", "FastGelu"),
    ),
    "a plugin of TensorRT": ("standard-operators", lambda: foreign("trt", "TRT_MoE")),
    "a cache of 8 bits": ("cache-types", lambda: cache(T.FLOAT8E4M3FN)),
    "a cache of integers": ("cache-types", lambda: cache(T.INT32)),
    "zero points of 8 bits without sign": ("quantized-type", lambda: quantized(zero(T.UINT8))),
    "e5m2": ("quantized-type", lambda: quantized(zero(T.FLOAT8E5M2))),
    "a negative scale": ("quantized-scale", lambda: quantized(zero(T.INT8), scale=-1.0)),
    "a wider exponent": ("one-type", lambda: two("Pow", (T.FLOAT16, T.FLOAT))),
    "float64 inside": ("known-types", lambda: between(T.DOUBLE)),
    "a cast beyond float16": ("finite-constants", lambda: cast_constant(-3.4e38)),
    "uint8 inside": ("known-types", lambda: between(T.UINT8)),
    "no rank at all": ("named-axes", lambda: one("Sigmoid", shape=None)),
    "an input behind an identity": ("cache-is-input", behind_identity),
}
"""More forms of some faults: which rule, and the model."""


@pytest.mark.parametrize("name", VARIANTS)
def test_other_forms_of_a_fault(name: str) -> None:
    rule, make = VARIANTS[name]
    assert rule in broken(make())


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_forms_of_few_bits_are_not_complained_of(name: str) -> None:
    assert not broken(LEGITIMATE[name]())


def test_a_number_that_float16_holds_may_be_cast() -> None:
    assert not broken(cast_constant(-65504.0))


def test_operators_of_tensorrt_alone_are_for_the_graph_it_is_given() -> None:
    assert broken(activations_in_four_bits(), fixed=False) == {"standard-operators"}


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
    made = attention(is_causal=1, softcap=5.0)
    made.graph.node[0].name = "layers.5.attention/Attention"
    rules = [BY_ID[rule] for rule in ("attention-causal", "attention-softcap")]
    said = [text for rule in rules for text in (rule.id, rule.reason, rule.instead)]
    with fails(ExportError, found=[*said, "layers.5.attention/Attention"], do="report it"):
        require_clean(made, "the graph", error=ExportError, do="report it")


def test_notes_are_returned() -> None:
    notes = require_clean(attention(T.FLOAT), "the graph", error=ExportError, do="nothing")
    assert [f.rule.id for f in notes] == ["attention-float32"]
    assert notes[0].to_json()["severity"] == "note"


def test_a_fault_of_every_layer_is_one_line() -> None:
    findings = lint(FAULTS["no-cumsum"](True)) * 52
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


def test_constants_of_every_kind_are_seen() -> None:
    from twotower.graph_lint.view import GraphView

    attributes = {"value_int": 3, "value_ints": [3, 4], "value": constant("c", [5])}
    for kind, given in attributes.items():
        nodes = [node("Constant", [], ["c"], **{kind: given}), node("Neg", ["c"], ["y"])]
        made = model(nodes, [], [value("y", T.INT64, [None])])
        assert GraphView(made).constant("c") is not None, kind


def test_the_model_is_not_changed() -> None:
    made = FAULTS["declared-types"](True)
    before = made.SerializeToString()
    lint(made)
    assert made.SerializeToString() == before
