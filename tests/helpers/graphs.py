"""Recorded graphs with a fixture's weights, in ONNX Runtime without exporter or builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from safetensors import safe_open

from twotower.config import ModelConfig
from twotower.export.graphs.tower_graphs import build_graph
from twotower.spec import signatures, state_tensors
from twotower.weights.external import detach_weights, widen_to_float32

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a fixture by name."""
    out = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        with safe_open(shard, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                out[name] = file.get_tensor(name)
    return out


class GraphRunner:
    """The three graphs of one model, fed and read by name."""

    def __init__(
        self, config: ModelConfig, tensors: dict[str, np.ndarray], dtype: str = "float32"
    ) -> None:
        self.config, self._sessions, self._weights = config, {}, {}
        for name in signatures(config, dtype):
            model, self._weights[name] = graph_with_weight_inputs(config, name, tensors, dtype)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            self._sessions[name] = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

    def __call__(self, graph: str, **feeds: Any) -> dict[str, np.ndarray]:
        session = self._sessions[graph]
        names = [o.name for o in session.get_outputs()]
        known = {i.name for i in session.get_inputs()}
        every = {k: v for k, v in {**self._weights[graph], **feeds}.items() if k in known}
        return dict(zip(names, session.run(names, every), strict=True))

    def extend(
        self, state: dict[str, np.ndarray], tokens: Any, past: Any, lengths: Any = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The context graph on tokens [B,L]; the new state under its input names, and `hidden`."""
        tokens, past = np.asarray(tokens, np.int64), np.asarray(past, np.int64)
        lengths = np.asarray([tokens.shape[1]] * len(tokens) if lengths is None else lengths)
        out = self("context", tokens=tokens, chunk_length=lengths, past_length=past, **state)
        pairs = state_tensors(self.config, "float32")
        return {s.past.name: out[s.present.name] for s in pairs}, out["hidden"]


def graph_with_weight_inputs(
    config: ModelConfig, name: str, tensors: dict[str, np.ndarray], dtype: str
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A graph whose weights are inputs, widened to float32, and those weights."""
    graph = build_graph(name, config, dtype)
    for i, weight in enumerate(graph.weights):
        value = graph.model.graph.initializers[weight.name]
        value.const_value = ir.ExternalTensor(
            "x", i, weight.nbytes, value.dtype, shape=ir.Shape(weight.shape), name=weight.name
        )
    model = ir.to_proto(graph.model)
    if dtype != "float32":
        widen_to_float32(model)
    detach_weights(model)
    weights = {}
    for weight in graph.weights:
        flat = np.concatenate([tensors[s].astype(np.float32).reshape(-1) for s in weight.sources])
        flat = -np.exp(flat) if weight.negated_exp else flat
        flat = flat.reshape(-1, weight.shape[0]).T if weight.transposed else flat
        weights[weight.name] = np.ascontiguousarray(flat.reshape(weight.shape))
    return model, weights


def zero_state(config: ModelConfig, rows: int, capacity: int) -> dict[str, np.ndarray]:
    """A state before the first token."""
    sizes = {"B": rows, "T": capacity}
    return {
        s.past.name: np.zeros(s.past.shape(sizes), np.float32)
        for s in state_tensors(config, "float32")
    }


def random_state(
    config: ModelConfig, rows: int, capacity: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """A non-zero state that differs in every tensor: zeros would hide swapped or unread inputs."""
    rng = np.random.default_rng(seed)
    sizes = {"B": rows, "T": capacity}
    return {
        s.past.name: rng.standard_normal(s.past.shape(sizes)).astype(np.float32)
        for s in state_tensors(config, "float32")
    }
