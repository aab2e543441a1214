"""From two opened bundles to the report of what quantization costs: bytes, figures, and one part quantized at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.bundle import GRAPH_FILES, Bundle
from twotower.calibration.quantize import precision_of, source_identity
from twotower.calibration.recipes import parts_of
from twotower.errors import ConfigError
from twotower.evaluate.quantization.bundle_bytes import bytes_report
from twotower.evaluate.quantization.price import PriceConfig, measure_price
from twotower.evaluate.quantization.variants import Mixer
from twotower.evaluate.suite import Suite
from twotower.export.graphs import Precision, build_graph
from twotower.runtime import TwoTower

__all__ = ["Pair", "note_of", "parts_alone", "price_of", "require_pair"]

_TARGET = "ort-cpu"


@dataclass(frozen=True, slots=True)
class Pair:
    """A quantized bundle and the float one it is measured against."""

    quantized: Bundle
    reference: Bundle


def require_pair(first: Bundle, second: Bundle) -> Pair | None:
    """The two in their roles, whichever was named first; None where neither or both are quantized.

    Raises:
        ConfigError: they are of different checkpoints.
    """
    if (first.quantization is None) == (second.quantization is None):
        return None
    pair = Pair(first, second) if first.quantization is not None else Pair(second, first)
    if pair.quantized.source.get("shards") != pair.reference.source.get("shards"):
        raise ConfigError(
            f"'{pair.quantized.path}' was not made from the checkpoint of '{pair.reference.path}'",
            found=f"sources {pair.quantized.source['name']} and {pair.reference.source['name']}, with other shards",
            do="name the float bundle it was quantized from",
        )
    return pair


def price_of(
    pair: Pair,
    opened: tuple[TwoTower, TwoTower],
    suite: Suite,
    config: PriceConfig,
    *,
    sensitivity: bool = True,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The report.

    Args:
        pair: The bundles.
        opened: The quantized and the float one, opened.
        suite: The problems.
        config: What is asked for.
        sensitivity: Also measure with one layer kind, and one tower, quantized at a time.
        threads: Threads of the mixtures, as the bundles were opened with.
        progress: Called with (problems done, problems in all).
    """
    quantized, reference = opened
    why_not = _why_no_parts(pair, opened) if sensitivity else "parts were not measured alone: not asked for"
    with ExitStack() as stack:
        variants: dict[str, TwoTower] = {}
        if not why_not:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twotower-parts-")))
            mixer = Mixer(pair.reference, [pair.quantized], scratch, threads=threads)
            for name, precision in parts_alone(pair.quantized):
                variants[name] = stack.enter_context(mixer.open(precision))
        report = measure_price(reference, quantized, suite, config, variants=variants, progress=progress)
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
    report["why_not"] = why_not
    return report


def note_of(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report belongs into the bundle's manifest."""
    total = report["compared"]
    return {
        "suite": report["suite"],
        "target": report["quantized"]["target"],
        "generation": report["generation"],
        "budget": report["budget"],
        **{name: total[name] for name in ("retention", "passes_per_block", "inflation", "step_time", "speedup")},
        "flags": report["flags"],
    }


def parts_alone(bundle: Bundle) -> Iterator[tuple[str, Precision]]:
    """Every layer kind of a quantized bundle alone, then every tower."""
    whole = precision_of(bundle)
    graphs = (build_graph(name, bundle.config, bundle.dtype) for name in GRAPH_FILES)
    parts = {p.name: p for graph in graphs for p in parts_of(bundle.config, graph.weights) if p.name in whole.weights}
    for kind in dict.fromkeys(part.kind for part in parts.values()):
        yield kind, _restricted(whole, {name for name, part in parts.items() if part.kind == kind})
    for tower in ("context", "denoiser"):
        yield f"{tower} tower", _restricted(whole, {name for name, part in parts.items() if part.tower == tower})


def _restricted(whole: Precision, chosen: set[str]) -> Precision:
    weights = {name: how for name, how in whole.weights.items() if name in chosen}
    return Precision(weights, {name: how for name, how in whole.activations.items() if name in weights})


def _why_no_parts(pair: Pair, opened: tuple[TwoTower, TwoTower]) -> str:
    if any(model.target != _TARGET for model in opened):
        return f"parts were not measured alone: that needs target {_TARGET}, this is {opened[0].target}"
    facts = pair.quantized.quantization
    if facts is None or facts["source"] != source_identity(pair.reference):
        return f"parts were not measured alone: the bundle was not made from the weights of {pair.reference.path.name} themselves"
    return ""
