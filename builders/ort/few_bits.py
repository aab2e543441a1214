"""Weights in few bits, for ONNX Runtime on a CPU: multiplied and looked up as they are stored, not expanded by every pass.

    product    `com.microsoft.MatMulNBits`: integers of 4 or 8 bits, a scale for 32 of them, and the input rounded to 8 bits
               for each block of its values, as it comes. Sums are of integers, and several times as
               fast
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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from twotower.builders.ort.chosen_experts import is_slice
from twotower.builders.ort.node_writer import NodeWriter
from twotower.builders.ort.products import with_branches
from twotower.config.formats import NARROW_BLOCK, product_block
from twotower.dtypes import DTYPES
from twotower.product_probe import EVEN_ROWS
from twotower.weights.refs import WeightRef

__all__ = [
    "UNSIGNED",
    "StoredProduct",
    "from_blocks",
    "probe_graph",
    "read_as_stored",
    "stored_product",
    "stored_products",
]

UNSIGNED: Mapping[str, str] = {"int4": "uint4", "int8": "uint8"}
"""How values are stored for the product, by how a bundle stores them: the zero moved to the middle."""

Located = Mapping[str, tuple[str, WeightRef]]

_PRODUCTS = ("MatMul", "FusedMatMul")
_VENDOR = "com.microsoft"
_INT8_INPUTS = 4  # `accuracy_level`


@dataclass(frozen=True, slots=True)
class StoredProduct:
    """A weight that products read as it is stored.

    Attributes:
        scales: The name of its scales.
        block: Weights that share a scale in the product, and values of an input that are rounded
            together.
        repeats: Blocks that one of the stored scales is for.
    """

    scales: str
    block: int
    repeats: int


def stored_products(
    model: onnx.ModelProto,
    refs: Mapping[str, WeightRef],
    *,
    even_rows: bool,
) -> dict[str, StoredProduct]:
    """The weights of a recorded graph that such products can read.

    Args:
        model: The graph as it was recorded.
        refs: Its weights.
        even_rows: Whether its passes always have an even number of rows. Products of experts have
            in any case.
    """
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def multiplied(name: str) -> bool:
        readers = users.get(name, [])
        return bool(readers) and all(
            node.op_type == "MatMul" or (node.op_type == "Transpose" and multiplied(node.output[0]))
            for node in readers
        )

    out = {}
    for node in model.graph.node:
        if (
            node.op_type != "DequantizeLinear"
            or node.input[0] not in refs
            or not multiplied(node.output[0])
        ):
            continue
        ref = refs[node.input[0]]
        group = next((a.i for a in node.attribute if a.name == "block_size"), 0) or ref.shape[-1]
        block = product_block(ref.shape[-1], group, even_rows=even_rows or len(ref.shape) > 2)
        if ref.dtype in UNSIGNED and block:
            out[node.input[0]] = StoredProduct(node.input[1], block, group // block)
    return out


def _as_blocks(ref: WeightRef, blocks: int) -> WeightRef:
    """How a product wants to be told of an unsigned matrix [out, in]: bytes [out, blocks, bytes of a block]."""
    return WeightRef(
        "uint8", (ref.shape[0], blocks, ref.nbytes // (ref.shape[0] * blocks)), ref.offset
    )


def from_blocks(model: onnx.ModelProto, located: Located) -> dict[str, tuple[str, WeightRef]]:
    """Places of an engine's weights, those that its products read in blocks as the matrices they are.

    Args:
        model: The engine's graph.
        located: The places as it names them.
    """
    bits = {
        node.input[1]: next(a.i for a in node.attribute if a.name == "bits")
        for graph in with_branches(model.graph)
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    out = dict(located)
    for name, width in bits.items():
        file, ref = located[name]
        rows, blocks, size = ref.shape
        out[name] = (
            file,
            WeightRef(f"uint{width}", (rows, blocks * size * 8 // width), ref.offset),
        )
    return out


def read_as_stored(model: onnx.ModelProto, located: Located) -> dict[str, tuple[str, WeightRef]]:
    """Writes products and lookups so that they read weights in few bits, in place, branches included.

    Args:
        model: An optimised graph, its weights outside and their expansion in it. Those in unsigned
            types must be expanded for products of matrices only.
        located: The place of each of its weights.

    Returns:
        The places as the graph names them now.
    """
    blocks: dict[str, int] = {}
    for graph in with_branches(model.graph):
        blocks |= _rewrite(graph, located)
    if any(
        located[name][1].shape[-1] > NARROW_BLOCK * count and not is_slice(name)
        for name, count in blocks.items()
    ):
        helper.set_model_props(model, {EVEN_ROWS: "1"})
    return {
        name: (file, _as_blocks(ref, blocks[name]) if name in blocks else ref)
        for name, (file, ref) in located.items()
    }


def _rewrite(graph: onnx.GraphProto, places: Located) -> dict[str, int]:
    """Writes one graph so; returns the blocks of a row of each matrix that its products read."""
    blocks: dict[str, int] = {}
    readers = {
        n.output[0]: n
        for n in graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in places
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        reader = readers.get(
            node.input[1] if node.op_type in _PRODUCTS else node.input[0] if node.input else ""
        )
        if reader is None:
            nodes.append(node)
        elif node.op_type in _PRODUCTS and places[reader.input[0]][1].dtype in UNSIGNED.values():
            blocks[reader.input[0]] = places[reader.input[1]][1].shape[-1]
            nodes.append(_product(node, reader, places))
        elif node.op_type == "Gather":
            nodes += _lookup(node, reader, places[reader.input[0]][1])
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input}
    del graph.node[:]
    graph.node.extend(
        node for node in nodes if node.output[0] not in readers or node.output[0] in read
    )
    return blocks


def _product(node: onnx.NodeProto, reader: onnx.NodeProto, places: Located) -> onnx.NodeProto:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes.get("transB") == 1 and attributes.get("alpha", 1.0) == 1.0, node.name
    (_, ref), (_, scales) = (places[name] for name in reader.input[:2])
    block = ref.shape[-1] // scales.shape[-1]
    return stored_product(
        [node.input[0], *reader.input[:2]], node.output[0], ref, block=block, name=node.name
    )


def stored_product(
    inputs: Sequence[str],
    output: str,
    ref: WeightRef,
    *,
    block: int,
    name: str = "",
) -> onnx.NodeProto:
    """A product of an input [..,K] with an unsigned matrix [N,K], to [..,N].

    Args:
        inputs: Names of the input, of the bytes of the matrix [N,K/block,bytes of a block] and of
            its scales [N,K/block].
        output: The name of the result.
        ref: The matrix.
        block: Weights that share a scale, and values of the input that are rounded together.
        name: Of the node.
    """
    rows, columns = ref.shape
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        name=name,
        domain=_VENDOR,
        N=rows,
        K=columns,
        bits=DTYPES[ref.dtype].bits,
        block_size=block,
        accuracy_level=_INT8_INPUTS,
    )


def _lookup(
    node: onnx.NodeProto, reader: onnx.NodeProto, ref: WeightRef
) -> Iterator[onnx.NodeProto]:
    """Rows of a table [V,D] of which each has a scale, exactly as if all were expanded; others as they were."""
    axis = {a.name: a.i for a in reader.attribute}
    if ref.dtype != "int8" or axis.get("axis", 1) != 0 or axis.get("block_size", 0) != 0:
        yield node
        return
    out, ids = node.output[0], node.input[1]
    names = {part: f"{out}/{part}" for part in ("values", "wide", "scales", "last", "scale")}
    yield helper.make_node(
        "Gather", [reader.input[0], ids], [names["values"]], name=f"{node.name}/values", axis=0
    )
    yield helper.make_node(
        "Cast", [names["values"]], [names["wide"]], name=f"{node.name}/wide", to=TensorProto.FLOAT
    )
    yield helper.make_node(
        "Gather", [reader.input[1], ids], [names["scales"]], name=f"{node.name}/scales", axis=0
    )
    last = numpy_helper.from_array(np.array([-1], np.int64))
    yield helper.make_node("Constant", [], [names["last"]], name=f"{node.name}/last", value=last)
    yield helper.make_node(
        "Unsqueeze", [names["scales"], names["last"]], [names["scale"]], name=f"{node.name}/scale"
    )
    yield helper.make_node("Mul", [names["wide"], names["scale"]], [out], name=node.name)


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
