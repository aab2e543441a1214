"""Only the chosen experts, for ONNX Runtime on a CPU: each computes the tokens that chose it.

The exported graph lets all experts compute every token, because TensorRT takes no work that depends
on data. ONNX Runtime does. This writes a layer of experts of an optimised graph anew, in operators
of the standard, so that an expert which nobody chose is neither computed nor read:

    pairs    (token, expert) in the order of the experts, and the rows of their tokens
    up       each expert's product of its own rows; a product of no rows ends at once
    relu^2   of all rows together
    down     as up
    sum      each token's results, in the order of the experts

An expert whose weights must be expanded first is a branch, `If` somebody chose it: expanding does
not end at once.

A token's numbers do not depend on the others. Products compute rows alike whatever their number
(`cpu_graph`, `quantized_products`; where that takes an even number, an expert with an odd one has
one row more, which nobody reads), and nothing is added up in an order that others decide: rows are
gathered, token by token. The numbers are those of the exported graph
(tests/builders/ort/test_chosen_experts.py).

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

from twotower.builders.ort.nodes import (
    PRODUCTS,
    NodeWriter,
    makers_of,
    readers_of,
    replace_nodes,
)
from twotower.config.formats import NARROW_BLOCK
from twotower.weights.external import drop_values
from twotower.weights.refs import WeightRef

Located = Mapping[str, tuple[str, WeightRef]]
"""By weight, the file it lies in, relative to the folder the engine is opened with, and where."""

_UP, _DOWN = ".experts.up_proj.weight", ".experts.down_proj.weight"
_UNSIGNED = {"uint4", "uint8"}
_PASSED = ("Cast", "Mul", "Where")
"""Operators between the last product of the experts and the sum over them."""


def is_slice(name: str) -> bool:
    """Whether a weight is one expert's part of a stack."""
    return name.endswith("]")


def _slice_name(stack: str, expert: int) -> str:
    return f"{stack}[{expert}]"


def stacked_places(located: Located) -> dict[str, tuple[str, WeightRef]]:
    """Places by the names of the exported graph, of an engine whose experts are apart."""
    out: dict[str, tuple[str, WeightRef]] = {}
    counts: dict[str, int] = {}
    for name, place in located.items():
        if is_slice(name):
            stack = name[: name.rindex("[")]
            counts[stack] = counts.get(stack, 0) + 1
        else:
            out[name] = place
    for stack, count in counts.items():
        file, first = located[_slice_name(stack, 0)]
        out[stack] = (file, replace(first, shape=(count, *first.shape[-2:])))
    return out


def choose_experts(
    model: onnx.ModelProto, located: Located, top: int, *, matrices: bool
) -> dict[str, tuple[str, WeightRef]]:
    """Rewrites every layer of experts so that only those that are chosen compute, in place.

    Args:
        model: An optimised graph, its weights outside.
        located: The place of each of its weights.
        top: Experts a token chooses.
        matrices: Give each expert matrices, which ONNX Runtime packs (copies) for the product when
            an engine is opened that packs; else stacks of one, which it reads where they are.
            Experts that products read as they are stored are matrices in any case.

    Returns:
        The places of the weights it has now: of what was a stack of experts, those of its parts.
    """
    nodes, places = list(model.graph.node), dict(located)
    written: dict[int, list[onnx.NodeProto]] = {}  # by the node they take the place of
    for layer in _layers(nodes, located):
        form = layer.form(located, matrices=matrices)
        for node in (*layer.chain, *layer.expansions, *layer.after):
            written[id(node)] = []
        written[id(layer.total)] = _ChosenExperts(layer, form).nodes(top)
        for stack in layer.stacks:
            places |= _slices(stack, places.pop(stack), matrices=form.matrices)
    replace_nodes(model.graph, (new for node in nodes for new in written.get(id(node), [node])))
    drop_values(model.graph, set(located) - set(places))
    return places


def _slices(
    stack: str, place: tuple[str, WeightRef], *, matrices: bool
) -> Iterator[tuple[str, tuple[str, WeightRef]]]:
    """Where each expert's part of a stacked weight lies: its bytes are consecutive."""
    file, ref = place
    each = ref.nbytes // ref.shape[0]
    shape = ref.shape[1:] if matrices else (1, *ref.shape[1:])
    for expert in range(ref.shape[0]):
        part = WeightRef(
            ref.dtype,
            shape,
            ref.offset + expert * each,
        )
        yield _slice_name(stack, expert), (file, part)


@dataclass(frozen=True)
class _Form:
    """How the experts of a layer compute.

    Attributes:
        even: Each computes an even number of rows, because its products compute rows alike only
            then.
    """

    matrices: bool
    expanded: bool
    even: bool


@dataclass(frozen=True)
class _ExpertLayer:
    """A layer of experts as the optimised graph has it.

    Attributes:
        tokens: [1,N,D].
        chosen: [E,N] bool, each token by the same number of experts.
        share: [E,N] float32.
        stacks: Weights with an axis of experts: matrices, and the scales of quantized ones.
        after: Operators behind the second product that weigh and select.
        total: The sum over experts.
    """

    scope: str
    tokens: str
    chosen: str
    share: str
    chain: Sequence[onnx.NodeProto]
    expansions: Sequence[onnx.NodeProto]
    stacks: Sequence[str]
    after: Sequence[onnx.NodeProto]
    total: onnx.NodeProto
    experts: int
    width: int

    def form(self, located: Located, *, matrices: bool) -> _Form:
        """What its weights allow."""
        types, widest = set(), NARROW_BLOCK
        for expansion in self.expansions:
            values, scales = (located[name][1] for name in expansion.input[:2])
            types.add(values.dtype)
            if values.dtype in _UNSIGNED:
                widest = max(widest, values.shape[-1] // scales.shape[-1])
        as_stored, expanded = bool(types & _UNSIGNED), bool(types - _UNSIGNED)
        return _Form(matrices or as_stored, expanded, even=widest > NARROW_BLOCK)


def _layers(nodes: Sequence[onnx.NodeProto], located: Located) -> Iterator[_ExpertLayer]:
    makers, readers = makers_of(nodes), readers_of(nodes)
    for up in nodes:
        stack = _stack_of(up, makers, _UP)
        if stack is None:
            continue
        chain = _chain(up, nodes, makers)
        products = (chain[0], chain[-1])
        expansions = [makers[node.input[1]] for node in products if node.input[1] in makers]
        weights = [name for node in (*expansions, *products) for name in node.input]
        stacks = [name for name in weights if name in located and len(located[name][1].shape) == 3]
        after = []
        (node,) = readers[chain[-1].output[0]]
        while node.op_type != "ReduceSum":
            assert node.op_type in _PASSED, node.name
            after.append(node)
            (node,) = readers[node.output[0]]
        inside = {output for n in (*chain, *after) for output in n.output}
        weigh, select = (next(n for n in after if n.op_type == kind) for kind in ("Mul", "Where"))
        share = next(name for name in weigh.input if name not in inside)
        experts, _, width = located[stack][1].shape
        yield _ExpertLayer(
            scope=up.name.rpartition("/MatMul")[0],
            tokens=up.input[0],
            chosen=makers[select.input[0]].input[0],
            share=makers[share].input[0],
            chain=chain,
            expansions=expansions,
            stacks=list(dict.fromkeys(stacks)),
            after=after,
            total=node,
            experts=experts,
            width=width,
        )


def _stack_of(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], end: str) -> str | None:
    """The stacked weight a product reads, expanded before or as it is."""
    if node.op_type not in PRODUCTS:
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


class _ChosenExperts:
    """Writes a layer in which experts compute only their own tokens.

    A pair is a token and an expert it chose; P of them, by expert.
    """

    def __init__(self, layer: _ExpertLayer, form: _Form) -> None:
        self._layer, self._form = layer, form
        self._w = NodeWriter(f"{layer.scope}/chosen")

    def nodes(self, top: int) -> list[onnx.NodeProto]:
        """The nodes, of which the last makes the sum over experts under the name it had."""
        w, layer = self._w, self._layer
        number = w.op("Cast", layer.chosen, to=TensorProto.INT64)
        tokens = w.op(
            "Reshape",
            layer.tokens,
            w.ints([-1, layer.width]),
        )
        counts, chosen = self._counts(number)
        starts = w.op(
            "Sub",
            w.op("CumSum", counts, w.ints(0)),
            counts,
        )
        rows = self._rows(tokens, chosen)
        if self._form.expanded:
            results = self._branches(rows, counts, starts)
        else:
            results = self._products(rows, counts)
        self._sum(results, starts, number, top)
        return w.nodes

    def _counts(self, number: str) -> tuple[str, str]:
        """How many rows each expert has [E], and the pairs that make them [E,N or N+1] bool.

        Where experts need an even number of rows, one with an odd number has one more.
        """
        w, chosen = self._w, self._layer.chosen
        counts = w.op("ReduceSum", number, w.ints([1]), keepdims=0)
        if not self._form.even:
            return counts, chosen
        odd = w.op("Mod", counts, w.ints(2))
        counts = w.op("Add", counts, odd)
        more = w.op(
            "Unsqueeze",
            w.op("Cast", odd, to=TensorProto.BOOL),
            w.ints([1]),
        )
        return counts, w.op("Concat", chosen, more, axis=1)

    def _rows(self, tokens: str, chosen: str) -> str:
        """The tokens [N,D] of the pairs [P,D]; a row more is the last token's."""
        w = self._w
        token = w.op(
            "Gather",
            w.op("NonZero", chosen),
            w.ints(1),
            axis=0,
        )
        if self._form.even:
            last = w.op(
                "Sub",
                w.op("Shape", tokens, start=0, end=1),
                w.ints([1]),
            )
            token = w.op("Min", token, last)
        return w.op("Gather", tokens, token, axis=0)

    def _products(self, rows: str, counts: str) -> str:
        """The results [P,D] of each expert's products of its own rows."""
        w, layer = self._w, self._layer
        axis = 0 if self._form.matrices else 1
        names = {layer.tokens: self._stacked(w, rows)}
        for node in layer.chain:
            if node not in (layer.chain[0], layer.chain[-1]):
                names[node.output[0]] = w.copied(node, names)
                continue
            whole = names.get(node.input[0], node.input[0])
            parts = w.several("Split", layer.experts, whole, counts, axis=axis)
            expansions = [e for e in layer.expansions if e.output[0] == node.input[1]]
            results = []
            for expert, part in enumerate(parts):
                own = self._slices(expert) | {node.input[0]: part}
                for expansion in expansions:
                    own[expansion.output[0]] = self._copied(w, expansion, own)
                results.append(self._copied(w, node, own))
            names[node.output[0]] = w.op("Concat", *results, axis=axis)
        return self._flat(w, names[layer.chain[-1].output[0]])

    def _branches(self, rows: str, counts: str, starts: str) -> str:
        """The results [P,D] of a branch for each expert."""
        w, count = self._w, self._layer.experts
        used = w.split(w.op("Greater", counts, w.ints(0)), count)
        firsts = w.split(starts, count)
        ends = w.split(w.op("Add", starts, counts), count)
        results = []
        for expert in range(count):
            inner = NodeWriter(f"{w.scope}/{expert}")
            own = inner.op(
                "Slice",
                rows,
                firsts[expert],
                ends[expert],
                inner.ints([0]),
            )
            names = self._slices(expert) | {self._layer.tokens: self._stacked(inner, own)}
            for node in (*self._layer.expansions, *self._layer.chain):
                names[node.output[0]] = self._copied(inner, node, names)
            self._flat(inner, names[self._layer.chain[-1].output[0]])
            nobody = NodeWriter(f"{w.scope}/{expert}/nobody")
            nobody.constant(np.zeros((0, self._layer.width), np.float32))
            branches = {"then_branch": inner.graph(), "else_branch": nobody.graph()}
            results.append(w.op("If", used[expert], **branches))
        return w.op("Concat", *results, axis=0)

    def _sum(
        self,
        results: str,
        starts: str,
        number: str,
        top: int,
    ) -> None:
        """The sum over each token's results [P,D], experts ascending."""
        w, layer = self._w, self._layer
        before = w.op("CumSum", number, w.ints(1), exclusive=1)
        place = w.op(
            "Add",
            before,
            w.op("Unsqueeze", starts, w.ints([1])),
        )
        descending = w.constant(np.arange(layer.experts, 0, -1, dtype=np.int64)[:, None])
        order = w.op(
            "Transpose",
            w.op("Mul", number, descending),
            perm=[1, 0],
        )
        # Exactly `top` of each token, even of one that is not a number and compares with nothing.
        _, mine = w.several("TopK", 2, order, w.ints([top]))
        place, share = (
            w.op(
                "GatherElements",
                w.op("Transpose", values, perm=[1, 0]),
                mine,
                axis=1,
            )
            for values in (place, layer.share)
        )
        own = w.op("Gather", results, place, axis=0)  # [N,top,D]
        # A product for each token, added up in one order; that of ReduceSum follows the number of
        # tokens.
        total = w.op(
            "MatMul",
            w.op("Unsqueeze", share, w.ints([1])),
            own,
        )  # [N,1,D]
        w.op(
            "Squeeze",
            total,
            w.ints([1]),
            named=layer.total.output[0],
        )

    def _slices(self, expert: int) -> dict[str, str]:
        """An expert's own part of each stack, by its name."""
        return {stack: _slice_name(stack, expert) for stack in self._layer.stacks}

    def _stacked(self, w: NodeWriter, rows: str) -> str:
        """Rows as the operators of this form take them: [n,D], or stacks of one [1,n,D]."""
        if self._form.matrices:
            return rows
        return w.op("Unsqueeze", rows, w.ints([0]))

    def _flat(self, w: NodeWriter, results: str) -> str:
        if self._form.matrices:
            return results
        return w.op("Squeeze", results, w.ints([0]))

    def _copied(self, w: NodeWriter, node: onnx.NodeProto, names: Mapping[str, str]) -> str:
        """An operator of one expert, without the axis of experts where there are matrices."""
        if not self._form.matrices:
            return w.copied(node, names)
        flat = onnx.NodeProto()
        flat.CopyFrom(node)
        for attribute in flat.attribute:
            if attribute.name == "axis" and attribute.i > 0:
                attribute.i -= 1
            if attribute.name == "perm":
                attribute.ints[:] = [i - 1 for i in attribute.ints if i > 0]
        return w.copied(flat, names)
