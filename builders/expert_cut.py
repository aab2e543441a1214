"""A tower's graph cut at its experts: programs that end with the routing, experts between them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx

from twotower.builders.segment import (
    BundleGraphs,
    Segment,
    conditioning_of,
    extracted,
    outputs_of,
    stream_axes,
    stream_before,
)
from twotower.bundle import ExpertsStep
from twotower.config import LayerKind, ModelConfig
from twotower.config.formats import FORMATS
from twotower.errors import BuildError
from twotower.kernels import ExpertShape
from twotower.kernels.shape import shape_of
from twotower.spec import (
    CONTEXT,
    DENOISER,
    EXPERTS_IN,
    EXPERTS_OUT,
    RESIDUAL_IN,
    RESIDUAL_OUT,
    SHARES,
    TensorSpec,
    TowerSignature,
)
from twotower.weights.external import weight_refs

_NUMBERED = re.compile(
    r"\b(layers|scale_shift_tables|past_key_values|past_conv|past_ssm|present|present_conv|present_ssm)\.(\d+)"
)
_MATRICES = {
    "experts.up_proj.weight": "up",
    "experts.down_proj.weight": "down",
    "shared_experts.up_proj.weight": "shared_up",
    "shared_experts.down_proj.weight": "shared_down",
}
_PARTS = {"": "", ".scale": "_scale", ".global_scale": "_global_scale"}
_ROLES = {
    f"{stem}{part}": f"{matrix}{suffix}"
    for stem, matrix in _MATRICES.items()
    for part, suffix in _PARTS.items()
}


class ExpertCut:
    """One tower, cut.

    Program k ends with the routing of the k-th layer of experts, its experts follow, and program k
    + 1 begins with adding what they give to the residual stream, the shared expert included. Handed
    over beside that are the residual stream and, in the denoiser, its conditioning. Where a recipe
    quantizes the experts' inputs too, kernels read them as they are.

    Args:
        model: The whole graph with its constant axes fixed and its weights outside; it is not
            changed.
        dtype: Element type of the residual stream.

    Raises:
        BuildError: the graph was exported without the names this cut goes by.
    """

    def __init__(
        self, model: onnx.ModelProto, signature: TowerSignature, config: ModelConfig, *, dtype: str
    ) -> None:
        self._model, self._signature, self._config, self._dtype = model, signature, config, dtype
        self._moe = config.indices(LayerKind.MOE)
        self._axes = stream_axes(model, signature)
        self._require_marks()

    @property
    def programs(self) -> int:
        """How many programs there are: one more than layers of experts."""
        return len(self._moe) + 1

    def program(self, number: int) -> Segment:
        """The k-th program, under its own tower's names; see `common_form`."""
        nodes = list(self._model.graph.node)
        before = self._moe[number - 1] if number else None
        after = self._moe[number] if number < len(self._moe) else None
        layers = (
            0 if before is None else before + 1,
            len(self._config.layers) if after is None else after,
        )
        given: dict[str, TensorSpec] = {}
        wanted: dict[str, TensorSpec] = {}
        if before is not None:
            given[stream_before(nodes, before)] = self._stream(RESIDUAL_IN)
            given[_mark(before, EXPERTS_OUT)] = self._stream(EXPERTS_OUT)
        if after is not None:
            wanted[stream_before(nodes, after)] = self._stream(RESIDUAL_OUT)
            wanted[_mark(after, EXPERTS_IN)] = self._stream(EXPERTS_IN)
            wanted[_mark(after, SHARES)] = TensorSpec(
                SHARES, "float32", (self._config.n_routed_experts, "N")
            )
        if self._signature.name == DENOISER and self._moe:
            (given if number else wanted).update(conditioning_of(self._model, self._dtype))
        wanted |= outputs_of(self._model, self._signature, layers)
        return extracted(self._model, self._signature, layers, given=given, wanted=wanted)

    def experts(self, number: int) -> ExpertsStep:
        """The experts after the k-th program; BuildError if kernels do not tile them."""
        step = self.found(number)
        return replace(step, code=_code_name(shape_of(step)))

    def found(self, number: int) -> ExpertsStep:
        """The k-th layer of experts as the graph has it, without the name of kernels."""
        layer, config = self._moe[number], self._config
        weights = self._weights(layer)
        return ExpertsStep(
            layer=layer,
            hidden=config.hidden_size,
            width=config.moe_intermediate_size,
            experts=config.n_routed_experts,
            top=config.num_experts_per_tok,
            shared_intermediate=config.shared_intermediate,
            dtype=self._dtype,
            formats={
                matrix: found
                for matrix in _MATRICES.values()
                if (found := _format(weights, matrix))
            },
            code="",
            weights=weights,
        )

    def _stream(self, name: str) -> TensorSpec:
        return TensorSpec(name, self._dtype, self._axes)

    def _weights(self, layer: int) -> Mapping[str, TensorSpec]:
        """The weights the kernels read, by role."""
        out: dict[str, TensorSpec] = {}
        for name, ref in weight_refs(self._model).items():
            _, found, rest = name.partition(f".layers.{layer}.mixer.")
            if found and rest in _ROLES:
                out[_ROLES[rest]] = TensorSpec(name, ref.dtype, ref.shape)
        return out

    def _require_marks(self) -> None:
        values = {name for node in self._model.graph.node for name in node.output}
        names = (EXPERTS_IN, SHARES, EXPERTS_OUT)
        missing = [
            name for i in self._moe for name in (_mark(i, n) for n in names) if name not in values
        ]
        if missing:
            raise BuildError(
                f"the graph {self._signature.name} cannot be cut at its experts",
                found=f"it was exported by an earlier version, which did not name {missing[0]}",
                do="export the checkpoint again, or build with --experts dense",
            )


def exported_cut(graphs: BundleGraphs, name: str) -> ExpertCut:
    """A tower of a bundle, its axes as they were exported."""
    bundle = graphs.bundle
    return ExpertCut(
        graphs.shared(name), bundle.signatures[name], bundle.config, dtype=bundle.dtype
    )


def experts_of(graphs: BundleGraphs) -> Iterator[ExpertsStep]:
    """The experts of both towers; BuildError if not cuttable or not tiled by kernels."""
    for name in (CONTEXT, DENOISER):
        cut = exported_cut(graphs, name)
        for number in range(cut.programs - 1):
            yield cut.experts(number)


def common_form(model: onnx.ModelProto, first: int) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A program under names that do not depend on its place: equal programs have equal bytes.

    Layers are counted from the program's first one, values and constants in the order of use, and
    what layers share comes first.

    Returns:
        The program, and its own name of every input and output that has another in the tower.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    outside = [value.name for value in (*graph.input, *graph.output)]
    named = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    names = {
        name: _NUMBERED.sub(lambda m: f"{m[1]}.{int(m[2]) - first}", name)
        for name in (*outside, *named)
    }
    nodes = _shared_first(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    for node in graph.node:
        node.name = _NUMBERED.sub(lambda m: f"{m[1]}.{int(m[2]) - first}", node.name)
        for name in (*node.input, *node.output):
            if name:
                names.setdefault(name, f"t{len(names)}")
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names[value.name]
    constants = sorted(graph.initializer, key=lambda t: t.name)
    del graph.initializer[:]
    graph.initializer.extend(constants)
    graph.name = "program"
    return out, {name: names[name] for name in outside if names[name] != name}


def _shared_first(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, those first that serve several layers and lie at the first that needs them."""
    first: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    late: set[str] = set()
    for node in nodes:
        if node.name.startswith("layers.") or not late.isdisjoint(node.input):
            rest.append(node)
            late.update(node.output)
        else:
            first.append(node)
    return [*first, *rest]


def _mark(layer: int, name: str) -> str:
    return f"layers.{layer}.moe/{name}"


def _code_name(shape: ExpertShape) -> str:
    """The folder of a shape's kernels: layers and towers of one shape have the same."""
    text = json.dumps(shape.to_json(), sort_keys=True)
    return f"experts-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _format(weights: Mapping[str, TensorSpec], matrix: str) -> tuple[str, int] | None:
    """A quantized matrix's format, and how many weights of a row share a scale: 0 for all."""
    values, scale = weights.get(matrix), weights.get(f"{matrix}_scale")
    if values is None or scale is None:
        return None
    stacks_or_groups = len(scale.axes) == len(values.axes) and scale.axes[-1] != 1
    group = int(values.axes[-1]) // int(scale.axes[-1]) if stacks_or_groups else 0
    found = next((name for name, how in FORMATS.items() if how.dtype == values.dtype), None)
    if found is None:
        stored = ", ".join(f"{how.dtype} ({name})" for name, how in FORMATS.items())
        raise BuildError(
            f"no kernel computes experts stored as {values.dtype}",
            found=f"{values.name}; there are kernels for {stored}",
            do="quantize with another recipe, or build with --experts dense",
        )
    return found, group
