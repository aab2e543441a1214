"""The mixture of experts recorded alone, against the torch model's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.helpers.graphs import FIXTURES
from twotower.config import ModelConfig, read_model_config
from twotower.evaluate.rounding import round_results
from twotower.export.graphs.builder import GraphBuilder
from twotower.export.graphs.layers import LayerWeights
from twotower.export.graphs.moe import moe
from twotower.graph_files import detach_weights
from twotower.model.layers import MoE
from twotower.spec import TensorSpec, TowerSignature

PREFIX = "moe."


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


def run_moe(config: ModelConfig, mixer: MoE, dtype: str, x: torch.Tensor) -> torch.Tensor:
    """The recorded mixer in `dtype`, every result rounded to it as a GPU does."""
    axes = ("B", "L", config.hidden_size)
    specs = (TensorSpec("x", dtype, axes), TensorSpec("y", dtype, axes))
    graph = GraphBuilder(TowerSignature("moe", specs[:1], specs[1:]), dtype)
    graph.output("y", moe(graph, graph.input("x"), LayerWeights(graph, PREFIX), config))
    recorded = graph.finish()
    feeds = {"x": x.numpy()}
    tensors = {PREFIX + name: value.detach().numpy() for name, value in mixer.named_parameters()}
    for i, weight in enumerate(graph.weights):
        value = recorded.graph.initializers[weight.name]
        shape, name = ir.Shape(weight.shape), weight.name
        place = ("x", i, weight.nbytes, value.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=shape, name=name)
        parts = [tensors[source].reshape(-1) for source in weight.sources]
        feeds[weight.name] = np.concatenate(parts).reshape(weight.shape)
    model = ir.to_proto(recorded)
    if dtype != "float32":
        round_results(model, dtype)
    detach_weights(model)
    options = ort.SessionOptions()
    # The casts that round are the point: an optimiser would take away some.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return torch.from_numpy(session.run(["y"], feeds)[0])


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
