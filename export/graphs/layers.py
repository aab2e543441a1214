"""What every layer is made of besides its mixer: norms, weights by name, and the MLP."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from twotower.export.graphs.builder import GraphBuilder
from twotower.weights.declared import Weight

__all__ = ["LayerWeights", "mlp", "rms_norm", "squared_relu"]


class LayerWeights:
    """Declares the weights below one checkpoint prefix.

    Args:
        graph: Where they are declared.
        prefix: For example `context_tower.layers.3.mixer.`.
    """

    def __init__(self, graph: GraphBuilder, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix

    def __call__(self, name: str, *shape: int, dtype: str | None = None) -> ir.Value:
        """One checkpoint tensor, in the model's dtype unless another is named."""
        full = self._prefix + name
        return self._graph.weight(Weight(full, shape, dtype or self._graph.dtype, (full,)))

    def rows(self, name: str, first: int, end: int, columns: int, *, suffix: str = "") -> ir.Value:
        """Rows [first, end) of a matrix, under its own name; with a suffix under that, and never quantized."""
        full = self._prefix + name
        origin = f"{full}{suffix}"
        return self._graph.weight(Weight(origin, (end - first, columns), self._graph.dtype, (full,), rows=(first, end), origin=origin))

    def is_quantized(self, name: str) -> bool:
        """Whether the weight is to be stored in few bits."""
        return self._prefix + name in self._graph.precision.weights

    def negated_exp(self, name: str, *shape: int) -> ir.Value:
        """-exp of a tensor in float32: the decay rates A, computed once at export."""
        full = self._prefix + name
        return self._graph.weight(Weight(f"{full}.negated_exp", shape, "float32", (full,), negated_exp=True))

    def transposed(self, name: str, *shape: int) -> ir.Value:
        """A small tensor with its last axis first, reordered at export; `shape` is the result's."""
        full = self._prefix + name
        weight = Weight(f"{full}.transposed", shape, self._graph.dtype, (full,), transposed=True)
        return self._graph.weight(weight)

    def joined(self, name: str, parts: Sequence[str], *shape: int) -> ir.Value:
        """Matrices with equally long rows, one below the other as one weight."""
        sources = tuple(self._prefix + part for part in parts)
        return self._graph.weight(Weight(self._prefix + name, shape, self._graph.dtype, sources))

    def stacked(self, pattern: str, count: int, *shape: int) -> ir.Value:
        """The tensors `pattern.format(0..count-1)` along a new first axis."""
        sources = tuple(self._prefix + pattern.format(j) for j in range(count))
        name = self._prefix + pattern.replace("{}.", "")
        return self._graph.weight(Weight(name, (count, *shape), self._graph.dtype, sources))


def rms_norm(graph: GraphBuilder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """RMSNorm over the last axis, in float32 (`weight` is float32), cast back to the model's dtype."""
    normed = graph.op("RMSNormalization", graph.to_float32(x), weight, axis=-1, epsilon=epsilon)
    return graph.to_model_dtype(normed)


def mlp(graph: GraphBuilder, x: ir.Value, weights: tuple[ir.Value, ir.Value]) -> ir.Value:
    """down(relu(up(x))^2), the non-gated MLP of dense layers and of the shared expert."""
    up, down = weights
    return graph.linear(squared_relu(graph, graph.linear(x, up)), down)


def squared_relu(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    """relu(x)^2, elementwise."""
    positive = graph.op("Relu", x)
    return graph.op("Mul", positive, positive)
