"""Graphs with `MoE` and `QMoE` made to run on a CPU, whose kernels of them refuse squared ReLU.

In two ways that know nothing of each other. `with_bodies` writes what the operators' documentation
says in operators of the standard: route by softmax over `router_probs`, keep the greatest k, weigh.
`with_cpu_kernels` keeps the operators, so that ONNX Runtime's own kernels read rows, routing,
stacks,
nibbles and scales: SwiGLU of a row that is there twice is x * sigmoid(alpha x) * x, which for a
large alpha is relu(x)^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.helper import make_node

__all__ = ["fused_nodes", "with_bodies", "with_cpu_kernels"]

_ALPHA = 1e6


def fused_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The operators a graph has for its layers of experts."""
    return [node for node in model.graph.node if node.op_type in ("MoE", "QMoE")]


def with_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph in which each of the operators is written out."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    shapes = {t.name: tuple(t.dims) for t in out.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in out.graph.node:
        nodes += _Body(node, shapes).nodes if node in fused_nodes(model) else [node]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    return out


def with_cpu_kernels(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A float32 graph whose operators ONNX Runtime's kernels compute on a CPU, its weights inline.

    Args:
        model: The graph.
        folder: Where its files of weights are named from.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    onnx.load_external_data_for_model(out, str(folder))
    tensors = {t.name: t for t in out.graph.initializer}
    for node in fused_nodes(out):
        options = {a.name: a for a in node.attribute}
        options["activation_type"].s = b"swiglu"
        for name, value in (("activation_alpha", _ALPHA), ("activation_beta", 0.0)):
            node.attribute.append(onnx.helper.make_attribute(name, value))
        node.attribute.append(onnx.helper.make_attribute("swiglu_fusion", 1))
        for name in node.input[2:3] if node.op_type == "MoE" else node.input[2:4]:
            twice = np.repeat(
                numpy_helper.to_array(tensors[name]), 2, axis=1
            )  # gate, value, gate, ...
            tensors[name].CopyFrom(numpy_helper.from_array(twice, name))
    return out


class _Body:
    """One operator in operators of the standard, computed in float32."""

    def __init__(self, node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._scope, self._shapes = f"{node.name}/body", shapes
        self._options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert self._options["activation_type"] == b"relu2"
        rows, probs, *weights = node.input
        if node.op_type == "QMoE":
            up, up_scale, _, down, down_scale = weights
            up, down = self._wide(up, up_scale), self._wide(down, down_scale)
        else:
            up, _, down = weights
        hidden = self._op(
            "Relu", self._op("MatMul", rows, self._op("Transpose", up, perm=[0, 2, 1]))
        )
        hidden = self._op("Mul", hidden, hidden)
        each = self._op("MatMul", hidden, self._op("Transpose", down, perm=[0, 2, 1]))  # [E,R,D]
        weight, mine = self._routing(probs)
        weighed = self._op("Mul", each, weight)
        weighed = self._op("Where", mine, weighed, self._constant(np.zeros((), np.float32)))
        self._op(
            "ReduceSum", weighed, self._constant(np.array([0])), named=node.output[0], keepdims=0
        )

    def _routing(self, probs: str) -> tuple[str, str]:
        """Weights [E,R,1] of softmax, and the greatest k."""
        softmax = self._op("Softmax", probs, axis=-1)
        _, best = self._several(
            "TopK", probs, self._constant(np.array([self._options["k"]])), axis=-1
        )
        experts = self._op("Shape", probs, start=1)
        every = self._op("Range", self._scalar(0), self._op("Squeeze", experts), self._scalar(1))
        same = self._op("Equal", self._op("Unsqueeze", best, self._constant(np.array([-1]))), every)
        same = self._op("Cast", same, to=TensorProto.FLOAT)
        chosen = self._op("ReduceMax", same, self._constant(np.array([1])), keepdims=0)  # [R,E]
        weight = self._op("Mul", softmax, chosen)
        if self._options["normalize_routing_weights"]:
            total = self._op("ReduceSum", weight, self._constant(np.array([1])), keepdims=1)
            weight = self._op("Div", weight, total)
        last = self._constant(np.array([-1]))
        turned = [self._op("Transpose", x, perm=[1, 0]) for x in (weight, chosen)]
        weight, chosen = (self._op("Unsqueeze", x, last) for x in turned)
        return weight, self._op("Cast", chosen, to=TensorProto.BOOL)

    def _wide(self, values: str, scale: str) -> str:
        """(value - middle) * scale of unsigned integers [E,out,in/pack], low half first."""
        count, rows, columns = self._shapes[values]
        bits = self._options["expert_weight_bits"]
        if bits == 4:
            last = self._constant(np.array([-1]))
            low = self._op("BitwiseAnd", values, self._constant(np.array(15, np.uint8)))
            high = self._op(
                "BitShift", values, self._constant(np.array(4, np.uint8)), direction="RIGHT"
            )
            values = self._op(
                "Concat", *(self._op("Unsqueeze", x, last) for x in (low, high)), axis=-1
            )
            columns *= 2
        wide = self._op("Cast", values, to=TensorProto.FLOAT)
        wide = self._op("Sub", wide, self._constant(np.array(1 << (bits - 1), np.float32)))
        group = self._options.get("block_size", columns)
        assert self._shapes[scale] == (
            (count, rows, columns // group) if "block_size" in self._options else (count, rows)
        )
        grouped = self._reshaped(wide, (count, rows, columns // group, group))
        scales = self._reshaped(scale, (count, rows, columns // group, 1))
        return self._reshaped(self._op("Mul", grouped, scales), (count, rows, columns))

    def _reshaped(self, value: str, shape: Sequence[int]) -> str:
        return self._op("Reshape", value, self._constant(np.array(shape)))

    def _scalar(self, value: int) -> str:
        return self._constant(np.array(value))

    def _constant(self, value: np.ndarray[Any, Any]) -> str:
        return self._op("Constant", value=numpy_helper.from_array(value))

    def _op(self, kind: str, *inputs: str, named: str = "", **attributes: Any) -> str:
        output = named or f"{self._scope}:{len(self.nodes)}"
        self.nodes.append(make_node(kind, inputs, [output], **attributes))
        return output

    def _several(self, kind: str, *inputs: str, **attributes: Any) -> list[str]:
        outputs = [f"{self._scope}:{len(self.nodes)}.{i}" for i in range(2)]
        self.nodes.append(make_node(kind, inputs, outputs, **attributes))
        return outputs
