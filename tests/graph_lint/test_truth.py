"""What rules say of TensorRT holds for TensorRT for RTX: faults are refused or built wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T

from tests.helpers.graph_faults import (
    FAULTS,
    LEGITIMATE,
    attention,
    constant,
    model,
    node,
    two,
    value,
)
from twotower.graph_lint import RULES
from twotower.graph_lint.operator_rules import ABSENT_OPERATORS
from twotower.graph_lint.rule import BUILT

pytestmark = pytest.mark.trt_rtx
SM = 89


@dataclass
class Outcome:
    """What the library made of a model.

    Attributes:
        stage: `parsing` or `building` where it refused, `dropped` where it ignored an input, else
            `built`.
        layers: (type, element type) of every layer.
        causal: Kinds of causal masks.
        outputs: Element types of the outputs.
    """

    stage: str
    said: list[str]
    layers: list[tuple[str, str]] = field(default_factory=list)
    causal: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


Build = Callable[..., Outcome]
"""From a model, and for which compute capability if it matters."""


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def logger(said: list[str]) -> Any:
    """One for all: the library ignores a second."""
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= trt.ILogger.Severity.WARNING.value:
                said.append(message)

    return Logger()


@pytest.fixture
def outcome(logger: Any, said: list[str]) -> Iterator[Build]:
    import tensorrt_rtx as trt

    def build(made: onnx.ModelProto, sm: int = SM) -> Outcome:
        said.clear()
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(made.SerializeToString()):
            return Outcome("parsing", list(said))
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        plan = builder.build_serialized_network(network, config)
        words = ("Unused Input:", "[RemoveDeadLayers] Input Tensor")
        dropped = any(word in line for line in said for word in words)
        stage = "building" if plan is None else "dropped" if dropped else "built"
        return Outcome(stage, list(said), *described(trt, network))

    yield build
    said.clear()


def described(trt: Any, network: Any) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    layers, causal = [], []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        first = layer.get_output(0) if layer.num_outputs else None
        layers.append((layer.type.name, first.dtype.name if first is not None else ""))
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionBoundaryLayer
            causal.append(layer.attention.causal_kind.name)
    return layers, causal, [network.get_output(i).dtype.name for i in range(network.num_outputs)]


REFUSED = {
    "parsing": (
        "no-data-dependent-output", "no-plugin-operators", "no-absent-operators",
        "no-scatter-reduction", "attention-past", "attention-softcap", "attention-precision",
        "cache-mode", "cache-axis", "cache-rank", "cache-length", "cache-types",
        "quantized-symmetric", "quantized-scale", "quantized-blocks", "one-type",
    ),
    "building": (
        "no-control-flow", "topk-limit", "attention-types", "attention-head-size",
        "attention-float32", "cache-is-input", "cache-is-output",
        "cache-readers", "quantized-weights", "quantized-values",
    ),
    "dropped": ("attention-lengths", "inputs-are-read", "inputs-are-values"),
}  # fmt: skip
"""Where the library refuses a rule's planted fault, or with which warning it ignores an input."""

STAGES = {rule: stage for stage, rules in REFUSED.items() for rule in rules}

SILENT: dict[str, Callable[[Outcome], bool]] = {
    "standard-operators": lambda o: ("ELEMENTWISE", "FLOAT") in o.layers,
    "no-trilu": lambda o: len(o.layers) == 19,
    "wide-normalization": lambda o: ("REDUCE", "HALF") in o.layers,
    "attention-causal": lambda o: o.causal == ["UPPER_LEFT"],
    "attention-rank": lambda o: len(o.layers) == 12,
    "attention-scale": lambda o: len(o.layers) == 18,
    "cache-indices": lambda o: "KV_CACHE_UPDATE" in dict(o.layers),
    "quantized-type": lambda o: ("QUANTIZE", "INT8") in o.layers,
    "known-types": lambda o: o.outputs == ["FLOAT"],
    "declared-types": lambda o: o.outputs == ["HALF"],
}
"""Faults that are built, and what was built."""


def test_every_claim_that_is_said_to_be_tested_is_tested() -> None:
    assert {
        rule.id for rule in RULES if rule.source.startswith(BUILT)
    } == STAGES.keys() | SILENT.keys()


@pytest.mark.parametrize("rule", STAGES)
def test_the_fault_is_refused(rule: str, outcome: Build) -> None:
    result = outcome(FAULTS[rule](True))
    assert result.stage == STAGES[rule], result.said


@pytest.mark.parametrize("rule", SILENT)
def test_the_fault_is_built_into_something_else(rule: str, outcome: Build) -> None:
    result = outcome(FAULTS[rule](True))
    assert result.stage == "built", result.said
    assert SILENT[rule](result), result


@pytest.mark.parametrize("rule", [*STAGES, *SILENT])
def test_without_the_fault_it_builds(rule: str, outcome: Build) -> None:
    result = outcome(FAULTS[rule](False))
    assert result.stage == "built", result.said


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_forms_of_few_bits_build(name: str, outcome: Build) -> None:
    result = outcome(LEGITIMATE[name](), sm=120)  # the first with float4
    assert result.stage == "built", result.said


def test_two_operators_convert_what_others_refuse(outcome: Build) -> None:
    """ONNX gives the result of RMSNormalization its weight's type; here it is the values'."""
    assert outcome(two("Pow", (T.FLOAT16, T.FLOAT))).outputs == ["HALF"]
    nodes = [node("RMSNormalization", ["x", "s"], ["y"])]
    weights = [constant("s", np.ones(64, np.float32))]
    x, y = value("x", T.FLOAT16, [4, 64]), value("y", T.FLOAT, [4, 64])
    assert outcome(model(nodes, [x], [y], weights=weights)).outputs == ["HALF"]


def test_a_plain_attention_is_eight_layers(outcome: Build) -> None:
    """The number that rules about its form compare with."""
    assert len(outcome(FAULTS["attention-scale"](False)).layers) == 8


def test_a_mask_and_is_causal_exclude_each_other(outcome: Build) -> None:
    assert outcome(attention(is_causal=1)).stage == "parsing"


def test_the_operators_the_parser_does_not_know_are_all_named(logger: Any) -> None:
    import tensorrt_rtx as trt

    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    schemas = onnx.defs.get_all_schemas_with_history()
    known = [s for s in schemas if s.domain == "" and s.since_version <= 24]
    names = {s.name for s in known if not s.deprecated}
    unknown = {name for name in names if not parser.supports_operator(name)}
    assert not {name for name in ABSENT_OPERATORS if name in names} - unknown
    named = set(ABSENT_OPERATORS) | {"Unique", "Compress", "StringSplit"}
    assert unknown <= named, "an operator of ONNX that the parser does not know and no rule names"
