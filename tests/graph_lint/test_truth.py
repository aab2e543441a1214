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
    FORMS,
    LEGITIMATE,
    constant,
    model,
    node,
    value,
)
from twotower.graph_lint import RULES
from twotower.graph_lint.rule import BUILT
from twotower.graph_lint.rules import OPERATORS

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


PLANTED = FAULTS | {name: make for name, (_, make) in FORMS.items()}

REFUSED = {
    "parsing": (
        "refused-operators", "attention-causal", "quantized-scale", "quantized-blocks", "one-type",
        "another type of keys",
    ),
    "building": (
        "attention-head-size", "attention-float32", "cache-in-place", "cache-readers",
        "a result that stays inside", "quantized-values", "a stored weight, transposed",
    ),
    "dropped": ("attention-lengths", "inputs-are-read", "a shape alone"),
}  # fmt: skip
"""Where the library refuses a planted fault, or with which warning it ignores an input."""

STAGES = {name: stage for stage, names in REFUSED.items() for name in names}

SILENT: dict[str, Callable[[Outcome], bool]] = {
    "another domain": lambda o: ("ELEMENTWISE", "FLOAT") in o.layers,
    "wide-normalization": lambda o: ("REDUCE", "HALF") in o.layers,
    "causal without a mask": lambda o: o.causal == ["UPPER_LEFT"],
    "cache-indices": lambda o: "KV_CACHE_UPDATE" in dict(o.layers),
    "no type said": lambda o: ("QUANTIZE", "INT8") in o.layers,
    "known-types": lambda o: o.outputs == ["FLOAT"],
    "declared-types": lambda o: o.outputs == ["HALF"],
}
"""Faults that are built, and what was built."""


def test_every_claim_that_is_said_to_be_tested_is_tested() -> None:
    claimed = {rule.id for rule in RULES if rule.source.startswith(BUILT)}
    assert claimed == FAULTS.keys() & (STAGES.keys() | SILENT.keys())


@pytest.mark.parametrize("name", STAGES)
def test_the_fault_is_refused(name: str, outcome: Build) -> None:
    result = outcome(PLANTED[name](True))
    assert result.stage == STAGES[name], result.said


@pytest.mark.parametrize("name", SILENT)
def test_the_fault_is_built_into_something_else(name: str, outcome: Build) -> None:
    result = outcome(PLANTED[name](True))
    assert result.stage == "built", result.said
    assert SILENT[name](result), result


@pytest.mark.parametrize("name", [*STAGES, *SILENT])
def test_without_the_fault_it_builds(name: str, outcome: Build) -> None:
    result = outcome(PLANTED[name](False))
    assert result.stage == "built", result.said


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_forms_of_few_bits_build(name: str, outcome: Build) -> None:
    result = outcome(LEGITIMATE[name](), sm=120)  # the first with float4
    assert result.stage == "built", result.said


def test_the_normalization_converts_what_others_refuse(outcome: Build) -> None:
    """ONNX gives its result its weight's type; here it is the values'."""
    nodes = [node("RMSNormalization", ["x", "s"], ["y"])]
    weights = [constant("s", np.ones(64, np.float32))]
    x, y = value("x", T.FLOAT16, [4, 64]), value("y", T.FLOAT, [4, 64])
    assert outcome(model(nodes, [x], [y], weights=weights)).outputs == ["HALF"]


def test_the_parser_knows_every_operator_that_is_written(logger: Any) -> None:
    import tensorrt_rtx as trt

    parser = trt.OnnxParser(trt.Builder(logger).create_network(0), logger)
    assert not [name for name in OPERATORS if not parser.supports_operator(name)]
