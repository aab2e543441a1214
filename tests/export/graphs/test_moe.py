"""The mixture of experts recorded alone, against the torch model's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.graphs import FIXTURES
from tests.helpers.moe_layer import PREFIX, moe_graph
from tools.half_precision import round_results
from twotower.config import ModelConfig, read_model_config
from twotower.export.graphs.layers import routing
from twotower.export.graphs.recorder import GraphBuilder, Layer
from twotower.model.layers import MoE
from twotower.spec import CONTEXT, TensorSpec, TowerSignature
from twotower.weights.declared import declared_weights
from twotower.weights.external import detach_weights


def small_moe() -> tuple[ModelConfig, MoE]:
    """Weights that float16 and bfloat16 hold exactly (halves), so that no dtype sees others."""
    config = replace(read_model_config(FIXTURES / "hybrid-a" / "config.json"), dtype="float32")
    mixer = MoE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            halves = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.copy_(halves * 0.5)
    return config, mixer


def session_of(graph: GraphBuilder) -> ort.InferenceSession:
    """What was recorded, every result rounded to its dtype, with its weights as inputs."""
    recorded = graph.finish()
    for i, weight in enumerate(graph.weights):
        value = recorded.graph.initializers[weight.name]
        shape, name = ir.Shape(weight.shape), weight.name
        place = ("x", i, weight.nbytes, value.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=shape, name=name)
    model = ir.to_proto(recorded)
    if graph.dtype != "float32":
        round_results(model, graph.dtype)
    detach_weights(model)
    options = ort.SessionOptions()
    # The casts that round are the point: an optimiser would take away some.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def run_moe(config: ModelConfig, mixer: MoE, dtype: str, x: torch.Tensor) -> torch.Tensor:
    """The recorded mixer in `dtype`, every result rounded to it as a GPU does."""
    graph = moe_graph(config, dtype)
    feeds = {"x": x.numpy()}
    tensors = {PREFIX + name: value.detach().numpy() for name, value in mixer.named_parameters()}
    for weight in graph.weights:
        parts = [tensors[source].reshape(-1) for source in weight.sources]
        feeds[weight.name] = np.concatenate(parts).reshape(weight.shape)
    return torch.from_numpy(session_of(graph).run(["y"], feeds)[0])


LARGE = [("float16", 2e3), ("bfloat16", 1e20), ("float32", 1e20)]


@pytest.mark.parametrize(("dtype", "large"), LARGE)
def test_an_expert_nobody_chose_may_overflow(dtype: str, large: float) -> None:
    """Every expert computes every token: relu(x)^2 of one that is not chosen is infinite here.

    The chosen ones are untouched, so the torch model, which never runs the other, is the oracle.
    The tolerance is two roundings of the narrow type.
    """
    config, mixer = small_moe()
    x = torch.ones(1, 3, config.hidden_size)
    x[:, 1] = -0.5
    expert = config.n_routed_experts - 1
    with torch.no_grad():
        mixer.gate.e_score_correction_bias[expert] = -100.0  # last in every choice
        want = mixer(x)
        even = torch.arange(config.moe_intermediate_size)[:, None] % 2 == 0
        mixer.experts[expert].up_proj.weight.copy_(torch.where(even, large, -large))
        torch.testing.assert_close(mixer(x), want, rtol=0, atol=0)
        hidden = mixer.experts[expert].up_proj(x).relu().square()
        assert (hidden.to(getattr(torch, dtype)).isinf().any(-1)).all(), "each token overflows"
    got = run_moe(config, mixer, dtype, x)
    step = float(torch.finfo(getattr(torch, dtype)).eps)
    torch.testing.assert_close(got, want, rtol=0, atol=2 * step * float(want.abs().max()))


EXPERTS = 8
GROUPS = [(1, 1, 2), (1, 1, 8), (4, 2, 3), (2, 1, 4), (8, 3, 2)]


@cache
def routing_session(groups: int, kept: int, chosen: int) -> ort.InferenceSession:
    """Routing alone: the gate is the identity, so a token is its own logits."""
    config = replace(
        read_model_config(FIXTURES / "hybrid-a" / "config.json"),
        hidden_size=EXPERTS,
        n_routed_experts=EXPERTS,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=chosen,
        routed_scaling_factor=2.5,
    )
    tokens = TensorSpec("tokens", "float32", (1, "N", EXPERTS))
    axes = (EXPERTS, "N", 1)
    outputs = TensorSpec("chosen", "bool", axes), TensorSpec("share", "float32", axes)
    declared = declared_weights(config, CONTEXT, "float32")
    graph = GraphBuilder(TowerSignature("routing", (tokens,), outputs), "float32", declared)
    made = routing(Layer(graph, config, PREFIX), graph.input("tokens"))
    graph.output("chosen", made[0])
    graph.output("share", made[1])
    return session_of(graph)


@cache
def sigmoid_session() -> ort.InferenceSession:
    spec = TensorSpec("x", "float32", ("N", EXPERTS)), TensorSpec("y", "float32", ("N", EXPERTS))
    graph = GraphBuilder(TowerSignature("sigmoid", spec[:1], spec[1:]), "float32")
    graph.output("y", graph.op("Sigmoid", graph.input("x")))
    return session_of(graph)


def chosen_experts(choice: np.ndarray, groups: int, kept: int, chosen: int) -> list[int]:
    """Routing as its definition reads, with sorts; of equal scores the first."""

    def best(values: list[np.float32], places: list[int], count: int) -> list[int]:
        return sorted(places, key=lambda i: (-values[i], i))[:count]

    size = EXPERTS // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    two = [sum((choice[i] for i in best(choice, m, 2)), np.float32(0)) for m in members]
    visible = [i for g in best(two, list(range(groups)), kept) for i in members[g]]
    return sorted(best(choice, visible, chosen))


VALUES = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0, 40.0])
ROW = st.lists(VALUES, min_size=EXPERTS, max_size=EXPERTS)


@pytest.mark.parametrize("case", GROUPS)
@given(tokens=st.lists(ROW, min_size=1, max_size=4), bias=ROW)
def test_routing_is_its_definition(
    case: tuple[int, int, int],
    tokens: list[list[float]],
    bias: list[float],
) -> None:
    """Scores repeat on purpose: of equal ones the first is chosen, and no more than asked for."""
    feeds = {
        "tokens": np.float32([tokens]),
        f"{PREFIX}gate.weight": np.eye(EXPERTS, dtype=np.float32),
        f"{PREFIX}gate.e_score_correction_bias": np.float32(bias)[:, None],
    }
    chosen, share = routing_session(*case).run(["chosen", "share"], feeds)
    for row, score in enumerate(sigmoid_session().run(None, {"x": np.float32(tokens)})[0]):
        want = chosen_experts(score + np.float32(bias), *case)
        assert np.flatnonzero(chosen[:, row, 0]).tolist() == want
        exact = np.zeros(EXPERTS)
        exact[want] = 2.5 * score[want].astype(np.float64) / score[want].sum(dtype=np.float64)
        np.testing.assert_allclose(share[:, row, 0], exact, rtol=1e-6, atol=0)
