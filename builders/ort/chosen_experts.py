"""Only the chosen experts, for ONNX Runtime on a CPU: each computes the tokens that chose it, and none if there are none.

The exported graph lets all experts compute every token, because TensorRT takes no work that depends
on data. ONNX Runtime does. This writes a mixture of an optimised graph anew, in operators of the
standard, so that an expert which nobody chose is neither computed nor read:

    pairs    (token, expert) in the order of the experts, and the rows of their tokens one after another
    up       each expert's product of its own rows; a product of no rows ends at once
    relu^2   of all rows together
    down     as up
    sum      each token's results, in the order of the experts

An expert whose weights must be expanded first is a branch, `If` somebody chose it: expanding does
not end at once.

A token's numbers do not depend on the others. Products compute rows alike whatever their number
(`products`, `few_bits`; where that takes an even number, an expert with an odd one has one
row more, which nobody reads), and nothing is added up in an order that others decide: rows are
gathered, token by token. The numbers are those of the exported graph
(tests/builders/test_ort_experts.py).

`com.microsoft.MoE` would do the same in one operator. Its CPU kernel knows no squared ReLU, so
that each row of the first matrix would be there twice, computed twice, and a row alone gets other
numbers from it than in a batch; it was measured no faster (docs/cpu-runtime.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto

from twotower.builders.ort.node_writer import NodeWriter
from twotower.config.formats import NARROW_BLOCK
from twotower.weights.refs import WeightRef

__all__ = ["choose_experts", "is_slice", "slice_name", "slices_of", "stacked_places"]

Located = Mapping[str, tuple[str, WeightRef]]

_UP, _DOWN = ".experts.up_proj.weight", ".experts.down_proj.weight"
_PRODUCTS = ("MatMul", "FusedMatMul")
_UNSIGNED = {"uint4", "uint8"}
_PASSED = ("Cast", "Mul", "Where")
"""Operators between the last product of the experts and the sum over them."""


def slice_name(stack: str, expert: int) -> str:
    """The name of one expert's part of a stacked weight."""
    return f"{stack}[{expert}]"


def is_slice(name: str) -> bool:
    """Whether a weight is one expert's part of a stack."""
    return name.endswith("]")


def slices_of(
    stack: str,
    place: tuple[str, WeightRef],
    *,
    matrices: bool,
) -> dict[str, tuple[str, WeightRef]]:
    """Where each expert's part of a stacked weight lies: its bytes are consecutive."""
    file, ref = place
    count, each = ref.shape[0], ref.nbytes // ref.shape[0]
    shape = ref.shape[1:] if matrices else (1, *ref.shape[1:])
    return {
        slice_name(stack, e): (file, WeightRef(ref.dtype, shape, ref.offset + e * each))
        for e in range(count)
    }


def stacked_places(located: Located) -> dict[str, tuple[str, WeightRef]]:
    """Places by the names of the exported graph, of an engine whose experts are apart."""
    counts: dict[str, int] = {}
    for name in located:
        if is_slice(name):
            stack = name[: name.rindex("[")]
            counts[stack] = counts.get(stack, 0) + 1
    out = {name: place for name, place in located.items() if not is_slice(name)}
    for stack, count in counts.items():
        file, ref = located[slice_name(stack, 0)]
        out[stack] = (file, replace(ref, shape=(count, *ref.shape[-2:])))
    return out


def choose_experts(
    model: onnx.ModelProto,
    located: Located,
    top: int,
    *,
    matrices: bool,
) -> dict[str, tuple[str, WeightRef]]:
    """Writes every mixture of experts so that only those that are chosen compute, in place.

    Args:
        model: An optimised graph, its weights outside.
        located: The place of each of its weights.
        top: Experts a token chooses.
        matrices: Give each expert matrices, which ONNX Runtime packs (copies) for the product when
            an engine is opened that packs; else stacks of one, which it reads where they are.
            Experts that products read in few bits are matrices in any case.

    Returns:
        The places of the weights it has now: of what was a stack of experts, those of its parts.
    """
    mixtures = list(_mixtures(model, located))
    places = dict(located)
    forms = {m.scope: _form_of(m, located, matrices=matrices) for m in mixtures}
    at = {id(m.total): _written(m, top, forms[m.scope]) for m in mixtures}
    gone = {id(node) for m in mixtures for node in (*m.chain, *m.readers, *m.after, m.total)}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += at.get(id(node), [node] if id(node) not in gone else [])
    for m in mixtures:
        for stack in m.stacks:
            places |= slices_of(stack, places.pop(stack), matrices=forms[m.scope].matrices)
    inputs = [
        value for value in model.graph.input if value.name in places or value.name not in located
    ]
    inline = [t for t in model.graph.initializer if t.name in places or t.name not in located]
    del model.graph.node[:], model.graph.input[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(inline)
    return places


@dataclass(frozen=True)
class _Mixture:
    """A mixture of experts as the optimised graph has it.

    Attributes:
        scope: Its layer.
        tokens: [1,N,D].
        chosen: [E,N] bool, each token by the same number of experts.
        share: [E,N] float32.
        chain: The operators from the first product to the second, in their order.
        readers: Those that expand a quantized stack, by their output.
        stacks: Weights with an axis of experts: matrices, and the scales of quantized ones.
        after: Operators behind the second product that weigh and select.
        total: The sum over experts.
        experts: E.
        width: D.
    """

    scope: str
    tokens: str
    chosen: str
    share: str
    chain: Sequence[onnx.NodeProto]
    readers: Sequence[onnx.NodeProto]
    stacks: Sequence[str]
    after: Sequence[onnx.NodeProto]
    total: onnx.NodeProto
    experts: int
    width: int


@dataclass(frozen=True)
class _Form:
    """How the experts of a mixture compute.

    Attributes:
        matrices: Each has matrices; else stacks of one.
        expanded: Their weights are expanded first.
        even: Each computes an even number of rows, because its products compute rows alike only
            then.
    """

    matrices: bool
    expanded: bool
    even: bool


def _form_of(m: _Mixture, located: Located, *, matrices: bool) -> _Form:
    types, blocks = set(), [NARROW_BLOCK]
    for reader in m.readers:
        (_, values), (_, scales) = (located[name] for name in reader.input[:2])
        types.add(values.dtype)
        if values.dtype in _UNSIGNED:
            blocks.append(values.shape[-1] // scales.shape[-1])
    return _Form(
        matrices or bool(types & _UNSIGNED), bool(types - _UNSIGNED), max(blocks) > NARROW_BLOCK
    )


def _mixtures(model: onnx.ModelProto, located: Located) -> Iterator[_Mixture]:
    nodes = list(model.graph.node)
    makers = {name: node for node in nodes for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for up in nodes:
        stack = _stack_of(up, makers, _UP)
        if stack is None:
            continue
        chain = _chain(up, nodes, makers)
        readers = [
            makers[name]
            for node in (chain[0], chain[-1])
            for name in node.input[1:2]
            if name in makers
        ]
        stacks = [
            name
            for node in (*readers, chain[0], chain[-1])
            for name in node.input
            if name in located
        ]
        after, total = _behind(chain[-1], users)
        weigh = next(node for node in after if node.op_type == "Mul")
        select = next(node for node in after if node.op_type == "Where")
        inside = {output for node in (*chain, *after) for output in node.output}
        share = next(name for name in weigh.input if name not in inside)
        experts, _, width = located[stack][1].shape
        yield _Mixture(
            scope=up.name.rpartition("/MatMul")[0],
            tokens=up.input[0],
            chosen=makers[select.input[0]].input[0],
            share=makers[share].input[0],
            chain=chain,
            readers=readers,
            stacks=list(dict.fromkeys(name for name in stacks if len(located[name][1].shape) == 3)),
            after=after,
            total=total,
            experts=experts,
            width=width,
        )


def _stack_of(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], end: str) -> str | None:
    """The stacked weight a product reads, expanded before or as it is."""
    if node.op_type not in _PRODUCTS:
        return None
    name = node.input[1]
    if name in makers and makers[name].op_type == "DequantizeLinear":
        name = makers[name].input[0]
    return name if name.endswith(end) else None


def _chain(
    up: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """The operators that lead from an expert's first product to its second, both included."""
    reached, chain = set(up.output), [up]
    for node in nodes:
        if node is not up and reached & set(node.input):
            chain.append(node)
            reached |= set(node.output)
            if _stack_of(node, makers, _DOWN) is not None:
                return chain
    raise AssertionError(f"{up.name}: no second product")


def _behind(
    down: onnx.NodeProto,
    users: Mapping[str, Sequence[onnx.NodeProto]],
) -> tuple[list[onnx.NodeProto], onnx.NodeProto]:
    """What weighs and selects the results of all experts, and the sum over them."""
    after: list[onnx.NodeProto] = []
    node = down
    while True:
        (node,) = users[node.output[0]]
        if node.op_type == "ReduceSum":
            return after, node
        assert node.op_type in _PASSED, node.name
        after.append(node)


def _written(m: _Mixture, top: int, form: _Form) -> list[onnx.NodeProto]:
    """The nodes of a mixture in which experts compute the tokens that chose them."""
    w = NodeWriter(f"{m.scope}/chosen")
    number = w.op("Cast", m.chosen, to=TensorProto.INT64)
    rows, counts, starts = _pairs(w, m, number, even=form.even)
    compute = _branches if form.expanded else _products
    every = compute(w, m, (rows, counts, starts), matrices=form.matrices)
    _added(w, m, (every, starts, number), top)
    return w.nodes


def _products(w: NodeWriter, m: _Mixture, pairs: tuple[str, str, str], *, matrices: bool) -> str:
    """The results [P,D] of each expert's products of its own rows."""
    rows, counts, _ = pairs
    names = {m.tokens: rows if matrices else w.op("Unsqueeze", rows, w.ints([0]))}
    axis = 0 if matrices else 1
    for node in m.chain:
        if node not in (m.chain[0], m.chain[-1]):
            names[node.output[0]] = w.copied(node, names)
            continue
        parts = w.several(
            "Split", m.experts, names.get(node.input[0], node.input[0]), counts, axis=axis
        )
        results = []
        for e, part in enumerate(parts):
            own = {node.input[0]: part} | {stack: slice_name(stack, e) for stack in m.stacks}
            for reader in m.readers:
                if reader.output[0] == node.input[1]:
                    own[reader.output[0]] = w.copied(_flat(reader) if matrices else reader, own)
            results.append(w.copied(_flat(node) if matrices else node, own))
        names[node.output[0]] = w.op("Concat", *results, axis=axis)
    every = names[m.chain[-1].output[0]]
    return every if matrices else w.op("Squeeze", every, w.ints([0]))


def _branches(w: NodeWriter, m: _Mixture, pairs: tuple[str, str, str], *, matrices: bool) -> str:
    """The results [P,D] of a branch for each expert."""
    rows, counts, starts = pairs
    used = w.split(w.op("Greater", counts, w.ints(0)), m.experts)
    firsts = w.split(starts, m.experts)
    ends = w.split(w.op("Add", starts, counts), m.experts)
    results = [
        w.op(
            "If",
            used[e],
            then_branch=_expert(m, e, (rows, firsts[e], ends[e]), matrices=matrices),
            else_branch=_nobody(m, e),
        )
        for e in range(m.experts)
    ]
    return w.op("Concat", *results, axis=0)


def _pairs(w: NodeWriter, m: _Mixture, number: str, *, even: bool) -> tuple[str, str, str]:
    """Rows [P,D] of the pairs' tokens, by expert; how many each expert has, and its first.

    With `even` an expert of an odd number of rows has the last token's behind them once more.
    """
    tokens = w.op("Reshape", m.tokens, w.ints([-1, m.width]))
    counts, chosen = w.op("ReduceSum", number, w.ints([1]), keepdims=0), m.chosen
    if even:
        odd = w.op("Mod", counts, w.ints(2))
        counts = w.op("Add", counts, odd)
        more = w.op("Unsqueeze", w.op("Cast", odd, to=TensorProto.BOOL), w.ints([1]))
        chosen = w.op("Concat", chosen, more, axis=1)  # [E,N+1]
    starts = w.op("Sub", w.op("CumSum", counts, w.ints(0)), counts)
    token = w.op("Gather", w.op("NonZero", chosen), w.ints(1), axis=0)
    if even:
        last = w.op("Sub", w.op("Shape", tokens, start=0, end=1), w.ints([1]))
        token = w.op("Min", token, last)
    return w.op("Gather", tokens, token, axis=0), counts, starts


def _expert(
    m: _Mixture,
    expert: int,
    rows: tuple[str, str, str],
    *,
    matrices: bool,
) -> onnx.GraphProto:
    """The branch of an expert: its rows of all, from a first to an end, as the results [n,D]."""
    w = NodeWriter(f"{m.scope}/chosen/{expert}")
    every, first, end = rows
    own = w.op("Slice", every, first, end, w.ints([0]))
    names = {m.tokens: own if matrices else w.op("Unsqueeze", own, w.ints([0]))}
    names |= {stack: slice_name(stack, expert) for stack in m.stacks}
    for node in (*m.readers, *m.chain):
        names[node.output[0]] = w.copied(_flat(node) if matrices else node, names)
    if not matrices:
        w.op("Squeeze", names[m.chain[-1].output[0]], w.ints([0]))
    return w.graph()


def _nobody(m: _Mixture, expert: int) -> onnx.GraphProto:
    """The branch of an expert that nobody chose: no results, [0,D]."""
    w = NodeWriter(f"{m.scope}/chosen/{expert}/nobody")
    w.constant(np.zeros((0, m.width), np.float32))
    return w.graph()


def _flat(node: onnx.NodeProto) -> onnx.NodeProto:
    """An operator without the axis of experts in front."""
    out = onnx.NodeProto()
    out.CopyFrom(node)
    for attribute in out.attribute:
        if attribute.name == "axis" and attribute.i > 0:
            attribute.i -= 1
        if attribute.name == "perm":
            attribute.ints[:] = [i - 1 for i in attribute.ints if i > 0]
    return out


def _added(w: NodeWriter, m: _Mixture, pairs: tuple[str, str, str], top: int) -> None:
    """The sum over each token's results [P,D], experts ascending, under the name it had."""
    every, starts, number = pairs
    before = w.op("CumSum", number, w.ints(1), exclusive=1)
    place = w.op("Add", before, w.op("Unsqueeze", starts, w.ints([1])))
    descending = w.constant(np.arange(m.experts, 0, -1, dtype=np.int64)[:, None])
    order = w.op("Transpose", w.op("Mul", number, descending), perm=[1, 0])
    # Exactly `top` of each token, even of one that is not a number and compares with nothing.
    _, mine = w.several("TopK", 2, order, w.ints([top]))
    place = w.op("GatherElements", w.op("Transpose", place, perm=[1, 0]), mine, axis=1)
    share = w.op("GatherElements", w.op("Transpose", m.share, perm=[1, 0]), mine, axis=1)
    results = w.op("Gather", every, place, axis=0)  # [N,top,D]
    # A product for each token, added up in one order; that of ReduceSum follows the number of
    # tokens.
    total = w.op("MatMul", w.op("Unsqueeze", share, w.ints([1])), results)  # [N,1,D]
    w.op("Squeeze", total, w.ints([1]), named=m.total.output[0])
