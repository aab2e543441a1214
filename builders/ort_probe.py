"""A small graph of products in few bits, by which an engine's opener finds out whether a processor computes rows alike."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from twotower.builders.ort_few_bits import BLOCK, stored_product
from twotower.weights.refs import WeightRef

__all__ = ["probe_graph"]

_ROWS, _COLUMNS = 320, 416  # no multiples of what kernels compute at once
_SEED = 20


def probe_graph() -> bytes:
    """A graph with input `x` [M,K] and outputs `uint4` and `uint8` [M,N]: one product for each type, on fixed weights."""
    random = np.random.default_rng(_SEED)
    scales = (0.01 * (1 + random.random((_ROWS, _COLUMNS // BLOCK)))).astype(np.float32)
    weights, nodes, outputs = [numpy_helper.from_array(scales, "scales")], [], []
    for dtype, width in (("uint4", BLOCK // 2), ("uint8", BLOCK)):
        values = random.integers(0, 256, (_ROWS, _COLUMNS // BLOCK, width), dtype=np.uint8)
        weights.append(numpy_helper.from_array(values, f"{dtype}.values"))
        nodes.append(stored_product(["x", f"{dtype}.values", "scales"], dtype, WeightRef(dtype, (_ROWS, _COLUMNS), 0)))
        outputs.append(helper.make_tensor_value_info(dtype, TensorProto.FLOAT, ["M", _ROWS]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", _COLUMNS])
    graph = helper.make_graph(nodes, "products", [x], outputs, weights)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())
