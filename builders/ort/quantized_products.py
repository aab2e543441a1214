"""Quantized weights for ONNX Runtime on a CPU: multiplied and looked up as they are stored.

    product    `com.microsoft.MatMulNBits`: integers of 4 or 8 bits, a scale for 32 of them, and
               the input rounded to 8 bits for each block of its values, as it comes. Sums are of
               integers, and several times as fast
    embedding  the rows that are asked for are gathered, then expanded

The wider a block, the faster the product: one of 128 takes three quarters of the time of one of 32.
But a row's numbers must be its own, whatever rows are beside it, and with blocks of 64 and 128 the
kernels of ONNX Runtime compute the last row of an odd number another way. So wide blocks are for
products that always have an even number of rows: those of experts, which `chosen_experts` sees to,
and those of the denoiser, whose engine is run with one row more where a pass has an odd number of
positions (`EVEN_ROWS`). All others have blocks of 32. A scale for more weights than a block has is
written for each block, which is the same weight. Kernels differ by processor, so a build asks the
one it runs on (`probe_graph`), and so does whoever opens the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from twotower.builders.ort.chosen_experts import Located, is_slice
from twotower.builders.ort.nodes import (
    PRODUCTS,
    NodeWriter,
    attributes_of,
    readers_of,
    replace_nodes,
    with_branches,
)
from twotower.config.formats import NARROW_BLOCK, product_block
from twotower.dtypes import DTYPES
from twotower.product_probe import EVEN_ROWS
from twotower.weights.refs import WeightRef

UNSIGNED: Mapping[str, str] = {"int4": "uint4", "int8": "uint8"}
"""How values are stored for the product, by how a bundle has them: the zero is in the middle."""

_INT8_INPUTS = 4  # `accuracy_level`


@dataclass(frozen=True, slots=True)
class QuantizedProduct:
    """How products read a quantized weight.

    Attributes:
        block: Weights that share a scale in the product, and values of an input that are rounded
            together.
        repeats: Blocks that one of the stored scales is for.
    """

    scales: str
    block: int
    repeats: int


def quantized_products(
    model: onnx.ModelProto, refs: Mapping[str, WeightRef], *, even_rows: bool
) -> dict[str, QuantizedProduct]:
    """The weights of a recorded graph that products can read as they are stored.

    `even_rows` says that passes always have an even number of rows; products of experts always
    have.
    """
    readers = readers_of(model.graph.node)

    def is_multiplied(name: str) -> bool:
        """Whether products, maybe of its transpose, are all that read a value."""
        for node in readers.get(name, []):
            through = node.op_type == "Transpose" and is_multiplied(node.output[0])
            if node.op_type != "MatMul" and not through:
                return False
        return name in readers

    out = {}
    for node in model.graph.node:
        ref = refs.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if ref is None or ref.dtype not in UNSIGNED or not is_multiplied(node.output[0]):
            continue
        columns = ref.shape[-1]
        group = attributes_of(node).get("block_size", 0) or columns
        block = product_block(
            columns,
            group,
            even_rows=even_rows or len(ref.shape) > 2,
        )
        if block:
            out[node.input[0]] = QuantizedProduct(
                node.input[1],
                block,
                group // block,
            )
    return out


def read_as_stored(model: onnx.ModelProto, located: Located) -> dict[str, tuple[str, WeightRef]]:
    """Lets products and lookups read quantized weights, in place, branches included.

    Args:
        model: An optimised graph, its weights outside and their expansion in it. Those in unsigned
            types must be expanded for products of matrices only.
        located: The place of each of its weights.

    Returns:
        The places as the graph names them now: of a matrix that products read, its bytes
        [out, blocks, bytes of a block].
    """
    blocks: dict[str, int] = {}
    for graph in with_branches(model.graph):
        blocks |= _rewrite(graph, located)
    out = dict(located)
    for name, count in blocks.items():
        file, ref = located[name]
        rows, columns = ref.shape
        out[name] = (
            file,
            WeightRef(
                "uint8",
                (rows, count, ref.nbytes // (rows * count)),
                ref.offset,
            ),
        )
        if columns > NARROW_BLOCK * count and not is_slice(name):
            helper.set_model_props(model, {EVEN_ROWS: "1"})
    return out


def as_matrices(model: onnx.ModelProto, located: Located) -> dict[str, tuple[str, WeightRef]]:
    """Undoes `read_as_stored` for places: weights as the matrices they are."""
    out = dict(located)
    for graph in with_branches(model.graph):
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                bits = attributes_of(node)["bits"]
                file, ref = located[node.input[1]]
                rows, blocks, size = ref.shape
                matrix = WeightRef(
                    f"uint{bits}",
                    (rows, blocks * size * 8 // bits),
                    ref.offset,
                )
                out[node.input[1]] = (file, matrix)
    return out


def _rewrite(graph: onnx.GraphProto, located: Located) -> dict[str, int]:
    """Rewrites one graph; the blocks of a row, by matrix that its products read."""
    blocks: dict[str, int] = {}
    expansions: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in located:
            expansions[node.output[0]] = node
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        is_product = node.op_type in PRODUCTS
        operand = node.input[1 if is_product else 0] if node.input else ""
        expansion = expansions.get(operand)
        if expansion is None:
            nodes.append(node)
            continue
        values, scales = expansion.input[:2]
        ref = located[values][1]
        if is_product and ref.dtype in UNSIGNED.values():
            attributes = attributes_of(node)
            plain = attributes.get("transB") == 1 and attributes.get("alpha", 1.0) == 1.0
            assert plain, node.name
            blocks[values] = located[scales][1].shape[-1]
            inputs = [node.input[0], values, scales]
            nodes.append(_product(inputs, node, ref, blocks[values]))
        elif node.op_type == "Gather" and _has_row_scales(expansion, ref):
            nodes += _lookup(node, expansion)
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    replace_nodes(graph, (n for n in nodes if n.output[0] not in expansions or n.output[0] in read))
    return blocks


def _product(
    inputs: Sequence[str], result: onnx.NodeProto, ref: WeightRef, blocks: int
) -> onnx.NodeProto:
    """A product of an input [..,K] with an unsigned matrix [N,K], to [..,N].

    Args:
        inputs: Names of the input, of the bytes of the matrix [N,blocks,bytes of a block] and of
            its scales [N,blocks].
        result: A node with the name and the output to take.
        ref: The matrix.
        blocks: Of a row: weights that share a scale, and values of the input rounded together.
    """
    rows, columns = ref.shape
    return helper.make_node(
        "MatMulNBits",
        inputs,
        result.output,
        name=result.name,
        domain="com.microsoft",
        N=rows,
        K=columns,
        bits=DTYPES[ref.dtype].bits,
        block_size=columns // blocks,
        accuracy_level=_INT8_INPUTS,
    )


def _has_row_scales(expansion: onnx.NodeProto, ref: WeightRef) -> bool:
    how = attributes_of(expansion)
    return ref.dtype == "int8" and how.get("axis", 1) == 0 and how.get("block_size", 0) == 0


def _lookup(gather: onnx.NodeProto, expansion: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Rows of a table [V,D] of which each has a scale, exactly as if all were expanded."""
    output, ids = gather.output[0], gather.input[1]
    nodes = []

    def op(kind: str, part: str, *inputs: str, **attributes: Any) -> str:
        name = f"{output}/{part}"
        node = helper.make_node(
            kind,
            inputs,
            [name],
            name=f"{gather.name}/{part}",
            **attributes,
        )
        nodes.append(node)
        return name

    values = op("Gather", "values", expansion.input[0], ids, axis=0)
    wide = op("Cast", "wide", values, to=TensorProto.FLOAT)
    scales = op("Gather", "scales", expansion.input[1], ids, axis=0)
    last = op(
        "Constant",
        "last",
        value=numpy_helper.from_array(np.array([-1], np.int64)),
    )
    scale = op("Unsqueeze", "scale", scales, last)
    return [
        *nodes,
        helper.make_node(
            "Mul",
            [wide, scale],
            [output],
            name=gather.name,
        ),
    ]


_ROWS, _COLUMNS = 320, 640  # rows no multiple of what kernels compute at once
_BLOCKS = (NARROW_BLOCK, 64, 128)
_SEED = 20


def probe_graph() -> bytes:
    """A graph with input `x` [M,K] and outputs [M,N]: a product for each type and block.

    Weights are fixed. Wide blocks get an even number of rows, as in engines.
    """
    random = np.random.default_rng(_SEED)
    w = NodeWriter("probe")
    count = w.op("Shape", "x", start=0, end=1)
    # The first row once more where their number is odd.
    more = w.op(
        "Slice",
        "x",
        w.ints([0]),
        w.op("Mod", count, w.ints([2])),
        w.ints([0]),
    )
    even = w.op("Concat", "x", more, axis=0)
    weights, outputs = [], []
    for block in _BLOCKS:
        blocks = _COLUMNS // block
        scales = 0.01 * (1 + random.random((_ROWS, blocks)))
        weights.append(numpy_helper.from_array(scales.astype(np.float32), f"scales{block}"))
        for dtype in ("uint4", "uint8"):
            name, ref = f"{dtype}.{block}", WeightRef(dtype, (_ROWS, _COLUMNS), 0)
            shape = (_ROWS, blocks, ref.nbytes // (_ROWS * blocks))
            values = random.integers(0, 256, shape, dtype=np.uint8)
            weights.append(numpy_helper.from_array(values, f"{name}.values"))
            is_narrow = block == NARROW_BLOCK
            result = onnx.NodeProto(name=name, output=[name if is_narrow else f"{name}.even"])
            inputs = [
                "x" if is_narrow else even,
                f"{name}.values",
                f"scales{block}",
            ]
            w.nodes.append(_product(inputs, result, ref, blocks))
            if not is_narrow:
                w.op(
                    "Slice",
                    result.output[0],
                    w.ints([0]),
                    count,
                    w.ints([0]),
                    named=name,
                )
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", _ROWS]))
    x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", _COLUMNS])
    graph = helper.make_graph(w.nodes, "products", [x_info], outputs, weights)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString())
