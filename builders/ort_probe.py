"""A small graph of products in few bits, by which an engine's opener finds out whether a processor computes rows alike."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from twotower.builders.node_writer import NodeWriter
from twotower.builders.ort_few_bits import stored_product
from twotower.config.formats import NARROW_BLOCK
from twotower.weights.refs import WeightRef

__all__ = ["probe_graph"]

_ROWS, _COLUMNS = 320, 640  # rows no multiple of what kernels compute at once
_BLOCKS = (NARROW_BLOCK, 64, 128)
_SEED = 20


def probe_graph() -> bytes:
    """A graph with input `x` [M,K] and outputs [M,N]: a product for each type and block, on fixed weights.

    Blocks of 32 get the rows as they come, wider ones an even number of rows, as engines see to.
    """
    random = np.random.default_rng(_SEED)
    w, weights, outputs = NodeWriter("probe"), [], []
    even, count = _even_rows(w)
    for block in _BLOCKS:
        scales = (0.01 * (1 + random.random((_ROWS, _COLUMNS // block)))).astype(np.float32)
        weights.append(numpy_helper.from_array(scales, f"scales{block}"))
        for dtype, width in (("uint4", block // 2), ("uint8", block)):
            name = f"{dtype}.{block}"
            values = random.integers(0, 256, (_ROWS, _COLUMNS // block, width), dtype=np.uint8)
            weights.append(numpy_helper.from_array(values, f"{name}.values"))
            narrow = block == NARROW_BLOCK
            x, result = ("x", name) if narrow else (even, f"{name}.even")
            ref = WeightRef(dtype, (_ROWS, _COLUMNS), 0)
            operands = [x, f"{name}.values", f"scales{block}"]
            w.nodes.append(stored_product(operands, result, ref, block=block, name=name))
            if not narrow:
                w.op("Slice", result, w.ints([0]), count, w.ints([0]), named=name)
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", _ROWS]))
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", _COLUMNS])
    graph = helper.make_graph(w.nodes, "products", [x_info], outputs, weights)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())


def _even_rows(w: NodeWriter) -> tuple[str, str]:
    """The rows of `x`, the first once more where their number is odd; and the number [1]."""
    count = w.op("Shape", "x", start=0, end=1)
    more = w.op("Slice", "x", w.ints([0]), w.op("Mod", count, w.ints([2])), w.ints([0]))
    return w.op("Concat", "x", more, axis=0), count
