"""Mixed-precision variants of a bundle, and the report of what quantization costs."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import onnx_ir as ir

from twotower.bundle import GRAPH_FILES, MANIFEST_FILE, Bundle
from twotower.calibration.quantization_plan import precision_of, quantizable_of
from twotower.calibration.quantize import source_identity
from twotower.calibration.watched_engine import composed_engine, engine_places
from twotower.errors import ConfigError
from twotower.evaluate.quantization.impact import ImpactConfig, measure_impact
from twotower.evaluate.suite import Suite
from twotower.export.graph_files import point_to_data
from twotower.export.graphs.precision import Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.runtime import TwoTower
from twotower.runtime.engines.tower_engine import TowerEngine
from twotower.runtime.engines.towers import Towers
from twotower.runtime.tokenizer import Tokenizer
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, signatures
from twotower.weights.declared import Weight, declared_weights, lay_out
from twotower.weights.refs import WeightRef


class Variants:
    """Opens mixed-precision variants of a bundle; they take no disk but their graphs.

    Args:
        reference: A float bundle with a built `ort-cpu` engine.
        quantized: Bundles made from it, with built `ort-cpu` engines; together they must hold every
            format a variant asks for.
        scratch: A folder for the graphs.
        threads: Threads of the engines, 0 for as many as the bundle's own would take.
    """

    def __init__(
        self, reference: Bundle, quantized: Sequence[Bundle], scratch: Path, *, threads: int = 0
    ) -> None:
        self._reference, self._scratch, self._threads = reference, scratch, threads
        self._bundles = (reference, *quantized)
        self._precisions = [precision_of(bundle) for bundle in quantized]
        self._places = [
            {name: engine_places(bundle, name) for name in GRAPH_FILES} for bundle in self._bundles
        ]
        self._numbers = count()
        # ONNX Runtime reads weights of one folder only, links resolved: the nearest one that holds
        # all bundles.
        paths = [bundle.path.resolve() for bundle in self._bundles]
        self._root = Path(os.path.commonpath(paths))
        self._folders = [path.relative_to(self._root).as_posix() for path in paths]

    def open(self, precision: Precision) -> TwoTower:
        """A session in which these weights, and inputs of products, are quantized and no others.

        ConfigError if a weight is wanted in a format none of the bundles holds it in.
        """
        number = next(self._numbers)
        context, head, denoiser = (
            self._engine(name, precision, number) for name in (CONTEXT, CONTEXT_HEAD, DENOISER)
        )
        bundle = self._reference
        return TwoTower.from_towers(
            Towers(bundle.config, "float32", context, head, denoiser),
            tokenizer=Tokenizer.from_file(bundle.tokenizer_file) if bundle.tokenizer_file else None,
            trained_block_size=bundle.trained_block_size,
            defaults=bundle.defaults,
        )

    def _engine(self, name: str, precision: Precision, number: int) -> TowerEngine:
        graph = build_graph(
            name,
            self._reference.config,
            self._reference.dtype,
            precision,
        )
        point_to_data(graph.model, lay_out(graph.weights), "unused")
        located: dict[str, tuple[str, WeightRef]] = {}
        for weight in graph.weights:
            source = self._source(weight)
            # Scales that were expanded with their weight are not there.
            if weight.name in self._places[source][name]:
                location, ref = self._places[source][name][weight.name]
                located[weight.name] = (f"{self._folders[source]}/{location}", ref)
        return composed_engine(
            ir.to_proto(graph.model),
            located,
            self._scratch / f"{number}.{name}.onnx",
            root=self._root,
            signature=signatures(self._reference.config, "float32")[name],
            top=self._reference.config.num_experts_per_tok or None,
            threads=self._threads,
        )

    def _source(self, weight: Weight) -> int:
        """The bundle a weight is taken from."""
        if not weight.origin:
            return 0
        whole = weight.sources[0] if weight.rows is not None else weight.origin
        for i, precision in enumerate(self._precisions, 1):
            held = precision.weights.get(whole)
            if held is not None and weight.format in (None, held):
                return i
        raise ConfigError(
            f"no bundle holds {weight.origin} in the wanted format",
            found=f"{weight.format.label if weight.format else 'rows that stay as they are'}",
            do="report this: it is a defect of twotower",
        )


_TARGET = "ort-cpu"


@dataclass(frozen=True, slots=True)
class Pair:
    """A quantized bundle and the float one it is measured against."""

    quantized: Bundle
    reference: Bundle


def require_pair(first: Bundle, second: Bundle) -> Pair | None:
    """The two in their roles, whichever was named first; None where neither or both are quantized.

    ConfigError if they are of different checkpoints.
    """
    if (first.quantization is None) == (second.quantization is None):
        return None
    pair = Pair(first, second) if first.quantization is not None else Pair(second, first)
    if pair.quantized.source.get("shards") != pair.reference.source.get("shards"):
        raise ConfigError(
            f"'{pair.quantized.path}' was not made from the checkpoint of '{pair.reference.path}'",
            found=f"sources {pair.quantized.source['name']} and {pair.reference.source['name']}, "
            "with other shards",
            do="name the float bundle it was quantized from",
        )
    return pair


def impact_of(
    pair: Pair,
    opened: tuple[TwoTower, TwoTower],
    suite: Suite,
    config: ImpactConfig,
    *,
    sensitivity: bool = True,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The report on a pair whose quantized and float bundle are `opened`, in that order.

    `sensitivity` also measures with one layer kind, and one tower, quantized at a time, with
    `threads` as the bundles were opened with. `progress` is called with (problems done, in all).
    """
    quantized, reference = opened
    why_not = _why_no_parts(pair, opened) if sensitivity else "not asked for"
    with ExitStack() as stack:
        alone: dict[str, TwoTower] = {}
        if not why_not:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="twotower-parts-"))
            variants = Variants(
                pair.reference,
                [pair.quantized],
                Path(scratch),
                threads=threads,
            )
            for name, precision in parts_alone(pair.quantized):
                alone[name] = stack.enter_context(variants.open(precision))
        report = measure_impact(
            reference, quantized, suite, config, variants=alone, progress=progress
        )
    facts = pair.quantized.quantization
    assert facts is not None
    report["quantized"] = {
        "name": pair.quantized.path.resolve().name,
        "target": quantized.target,
        "recipe": facts["recipe"]["name"],
        "options": facts["options"],
        "precision": pair.quantized.precision,
    }
    report["reference"] = {"name": pair.reference.path.resolve().name, "target": reference.target}
    report["bytes"] = bytes_report(pair.quantized, pair.reference)
    report["why_not"] = f"parts were not measured alone: {why_not}" if why_not else ""
    return report


def parts_alone(bundle: Bundle) -> Iterator[tuple[str, Precision]]:
    """Every layer kind of a quantized bundle alone, then every tower."""
    whole = precision_of(bundle)
    parts = {name: part for name, part in quantizable_of(bundle).items() if name in whole.weights}
    kinds = dict.fromkeys(part.kind for part in parts.values())
    for what in (*kinds, "context tower", "denoiser tower"):
        weights = {
            name: whole.weights[name]
            for name, part in parts.items()
            if what in (part.kind, f"{part.tower} tower")
        }
        activations = {name: how for name, how in whole.activations.items() if name in weights}
        yield what, Precision(weights, activations)


def _why_no_parts(pair: Pair, opened: tuple[TwoTower, TwoTower]) -> str:
    if any(model.target != _TARGET for model in opened):
        return f"that needs target {_TARGET}, this is {opened[0].target}"
    facts = pair.quantized.quantization
    if facts is None or facts["source"] != source_identity(pair.reference):
        return f"the bundle was not made from the weights of {pair.reference.path.name} themselves"
    return ""


def bytes_by_kind(bundle: Bundle, dtype: str | None = None) -> dict[str, int]:
    """Bytes of all graphs' weights by layer kind; with a dtype those of a float bundle in it."""
    quantized = dtype is None and bundle.quantization is not None
    precision = precision_of(bundle) if quantized else Precision()
    kept = dtype or bundle.dtype
    out: Counter[str] = Counter()
    for name in GRAPH_FILES:
        for weight in declared_weights(bundle.config, name, kept, precision.weights):
            out[weight.role.value] += weight.nbytes
    return dict(out)


def bytes_report(quantized: Bundle, reference: Bundle) -> dict[str, Any]:
    """Before, after, and in bfloat16; the files of engines are not counted."""
    sizes = {
        "before": bytes_by_kind(reference),
        "after": bytes_by_kind(quantized),
        "bfloat16": bytes_by_kind(reference, "bfloat16"),
    }
    kinds = {}
    for kind in sorted(sizes["before"]):
        kinds[kind] = {name: size[kind] for name, size in sizes.items()}
    return {
        "files": {"before": _files(reference), "after": _files(quantized)},
        "weights": {name: sum(size.values()) for name, size in sizes.items()},
        "kinds": kinds,
    }


def _files(bundle: Bundle) -> int:
    return (
        sum(record.size for record in bundle.files.values())
        + (bundle.path / MANIFEST_FILE).stat().st_size
    )
