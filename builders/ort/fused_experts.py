"""Only the chosen experts, for ONNX Runtime on a GPU: one `com.microsoft.MoE` or `QMoE` a layer.

QMoE is for quantized weights. Both operators choose experts by themselves, by softmax over
`router_probs`. This model chooses otherwise (sigmoid, a bias that counts for the choice alone,
groups, a factor), so its routing stays in the graph. Left to the operator is to find experts and to
multiply: each pair of a token and an expert it chose is a row of its own, which has this one expert
and gives its result as it is.

    experts  [k,N]    those a token chose, ascending
    rows     [k*N,D]  all tokens, k times over
    probs    [k*N,E]  a row's expert far above the others: their softmax is 1 and 0
    results  [k*N,D]  of one operator with k = 1
    sum      [N,D]    share x result in float32, experts ascending

So choice and shares are those of the exported graph, in float32. What the operators offer for that
would not do: MoE weighs by softmax alone, and QMoE's `router_weights` has the type of the tokens
and is not read by CUDA kernels (docs/gpu-runtime.md).

Stacks [E,out,in] are what both operators read, so float ones stay in the bundle. Integers have to
be unsigned; they are written anew (`engine_weights`), and the operator lays them out for the GPU
when a session is opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.helper import make_opsetid

from twotower.builders.ort.nodes import NodeWriter, makers_of, replace_nodes
from twotower.builders.segment import needed_nodes
from twotower.bundle import ExpertsStep
from twotower.config.formats import FORMATS
from twotower.dtypes import numpy_dtype
from twotower.spec import EXPERTS_IN, SHARES
from twotower.weights.external import drop_values, weight_refs
from twotower.weights.refs import WeightRef

_DOMAIN = "com.microsoft"
_MATRICES = ("up", "down")
_CERTAIN = 10000.0
"""By how much a row's expert is above the others: exp(-10000) is 0, and any type holds it."""


def fuse_experts(model: onnx.ModelProto, layers: Iterable[ExpertsStep]) -> dict[str, WeightRef]:
    """Makes every layer of experts one operator, in place.

    Returns:
        Weights that the operators read from other bytes than the bundle's, and where those lie: an
        operator reads each as unsigned integers, two of 4 bits in a byte.
    """
    found = [_ExpertLayer.of(model, step) for step in layers]
    if not found:
        return {}
    graph = model.graph
    fused = {layer.total.name: layer.fused() for layer in found}
    nodes = [new for node in graph.node for new in fused.get(node.name, [node])]
    kept = [nodes[i] for i in needed_nodes(nodes, [v.name for v in graph.output])]
    replace_nodes(graph, kept)
    read = {name for node in kept for name in node.input}
    drop_values(graph, {t.name for t in graph.initializer} - read)
    if all(entry.domain != _DOMAIN for entry in model.opset_import):
        model.opset_import.append(make_opsetid(_DOMAIN, 1))
    row_scales = {name for layer in found for name in layer.row_scales}
    for tensor in graph.initializer:
        if tensor.name in row_scales:  # [E,out,1] in the bundle, [E,out] to the operator
            del tensor.dims[-1]
    places = weight_refs(model)
    return {name: places[name] for layer in found for name in layer.integers}


@dataclass(frozen=True)
class _ExpertLayer:
    """A layer of experts in a graph: tokens [B,L,D]; share [E,N] and total [N,D] float32."""

    step: ExpertsStep
    tokens: str
    share: str
    chosen: str
    total: onnx.NodeProto

    @classmethod
    def of(cls, model: onnx.ModelProto, step: ExpertsStep) -> _ExpertLayer:
        """The one of a layer: from its shares on, results are weighed, selected and added up."""
        scope = f"layers.{step.layer}.moe"
        mine = [node for node in model.graph.node if node.name.startswith(scope)]
        users = {name: node for node in mine for name in node.input}
        node = users[f"{scope}/{SHARES}"]
        for kind in ("Unsqueeze", "Mul", "Where"):
            assert node.op_type == kind, f"{node.name}: {node.op_type}, expected {kind}"
            select, node = node, users[node.output[0]]
        assert node.op_type == "ReduceSum", node.name
        chosen = makers_of(model.graph.node)[select.input[0]].input[0]
        return cls(
            step,
            f"{scope}/{EXPERTS_IN}",
            f"{scope}/{SHARES}",
            chosen,
            node,
        )

    def _weight(self, role: str) -> str:
        return self.step.weights[role].name

    @property
    def integers(self) -> list[str]:
        """Quantized matrices."""
        return [self._weight(matrix) for matrix in _MATRICES if matrix in self.step.formats]

    @property
    def row_scales(self) -> list[str]:
        """Scales of whole rows."""
        formats = self.step.formats
        rows = [matrix for matrix in _MATRICES if matrix in formats and formats[matrix][1] == 0]
        return [self._weight(f"{matrix}_scale") for matrix in rows]

    def fused(self) -> list[onnx.NodeProto]:
        """The nodes up to the sum over experts, which keeps its name."""
        step, w = self.step, NodeWriter(f"layers.{self.step.layer}.moe/fused")
        descending = w.constant(np.arange(step.experts, 0, -1, dtype=np.float32)[:, None])
        order = w.op(
            "Where",
            self.chosen,
            descending,
            w.constant(np.zeros((), np.float32)),
        )
        # Exactly `top` of each token, even of one that is not a number and compares with nothing.
        _, experts = w.several(
            "TopK",
            2,
            order,
            w.ints([step.top]),
            axis=0,
        )
        share = w.op("GatherElements", self.share, experts, axis=0)
        tokens = w.op(
            "Reshape",
            self.tokens,
            w.ints([-1, step.hidden]),
        )
        rows = w.op("Concat", *[tokens] * step.top, axis=0)
        certain = w.constant((_CERTAIN * np.eye(step.experts)).astype(numpy_dtype(step.dtype)))
        probs = w.op("Gather", certain, experts, axis=0)
        probs = w.op("Reshape", probs, w.ints([-1, step.experts]))
        results = self._operator(w, rows, probs)
        results = w.op(
            "Reshape",
            results,
            w.ints([step.top, -1, step.hidden]),
        )
        if step.dtype != "float32":
            results = w.op("Cast", results, to=TensorProto.FLOAT)
        weighed = w.op(
            "Mul",
            results,
            w.op("Unsqueeze", share, w.ints([-1])),
        )
        # Not ReduceSum, which may add in an order of its own.
        total = w.op("Sum", *w.split(weighed, step.top))
        w.op(
            "Squeeze",
            total,
            w.ints([0]),
            named=self.total.output[0],
        )
        return w.nodes

    def _operator(self, w: NodeWriter, rows: str, probs: str) -> str:
        """The one operator: results of rows [R,D] by the experts of `probs` [R,E]."""
        up, down = (self._weight(matrix) for matrix in _MATRICES)
        options: dict[str, Any] = {
            "domain": _DOMAIN,
            "k": 1,
            "activation_type": "relu2",
            "normalize_routing_weights": 1,
        }
        if not self.integers:
            return w.op("MoE", rows, probs, up, "", down, **options)
        name, group = self.step.formats["up"]
        options["quant_type"] = "int"
        options["expert_weight_bits"] = FORMATS[name].bits
        options["weights_prepacked"] = 0
        if group:
            options["block_size"] = group
        up_scale, down_scale = (self._weight(f"{matrix}_scale") for matrix in _MATRICES)
        return w.op("QMoE", rows, probs, up, up_scale, "", down, down_scale, **options)
