"""Bundle to bundle: the same graphs recorded with quantized weights, and the weights streamed into few bits, a piece at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from twotower import __version__
from twotower.bundle import (
    DATA_SUFFIX,
    GRAPH_FILES,
    MANIFEST_FILE,
    REPORT_FILE,
    Bundle,
    FileRecord,
    hash_file,
    link_file,
    require_room,
    unpublished,
    write_json,
)
from twotower.calibration.ranges import activation_scales
from twotower.calibration.recipes import Recipe, parts_of
from twotower.calibration.rounding import ROUNDINGS
from twotower.calibration.statistics_file import Statistics, identity_of
from twotower.calibration.streaming import stream_quantized
from twotower.config.formats import ACTIVATIONS
from twotower.errors import BundleError, CalibrationError, ConfigError
from twotower.export.graph_files import save_program
from twotower.export.graphs.precision import ActivationFormat, Precision
from twotower.export.graphs.tower_graphs import TowerGraph, build_graph
from twotower.graph_lint import require_clean
from twotower.weights.declared import lay_out

__all__ = [
    "Plan",
    "QuantizeConfig",
    "plan_quantization",
    "precision_of",
    "quantize_bundle",
    "require_float",
    "source_identity",
]

RANGES = ("max", "percentile", "mse")
SOURCES = ("trajectories", "text")
logger = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Options of one quantization.

    Attributes:
        rounding: How weights are rounded: one of `ROUNDINGS`.
        ranges: How the range of a product's input is read from its histogram: `max`, `percentile`
            (99.99 %) or `mse` (the clipping that costs least, for integers).
        calibrated_on: `trajectories` (every step of real denoising) or `text` (blocks without masks
            only; to see what that costs).
    """

    rounding: str = "mse"
    ranges: str = "mse"
    calibrated_on: str = "trajectories"

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--rounding", self.rounding, ROUNDINGS),
            ("--ranges", self.ranges, RANGES),
            ("--calibrated-on", self.calibrated_on, SOURCES),
        ):
            if value not in allowed:
                raise ConfigError(
                    f"{flag} cannot be {value!r}",
                    found=f"allowed: {', '.join(allowed)}",
                    do=f"choose another {flag}",
                )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe makes of a bundle: the graphs to write, and the precision they were recorded with."""

    recipe: Recipe
    config: QuantizeConfig
    precision: Precision
    graphs: Mapping[str, TowerGraph]
    statistics: str | None

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(w.nbytes for graph in self.graphs.values() for w in graph.weights)


def require_float(bundle: Bundle) -> None:
    """Refuses a bundle that is quantized already.

    Raises:
        BundleError: it is.
    """
    if bundle.quantization is not None:
        raise BundleError(
            f"bundle '{bundle.path}' is quantized already",
            found=f"recipe {bundle.quantization['recipe']['name']}; a second rounding would add to the errors of the first",
            do="quantize the bundle it was made from",
        )


def plan_quantization(
    bundle: Bundle,
    recipe: Recipe,
    config: QuantizeConfig | None = None,
    statistics: Statistics | None = None,
) -> Plan:
    """Records the graphs a recipe leads to; reads no weight.

    Args:
        bundle: A float bundle.
        recipe: What to quantize.
        config: Options.
        statistics: Ranges of the inputs; needed by recipes that round them.

    Raises:
        BundleError: the bundle is quantized already.
        RecipeError: the recipe does not fit the model.
        CalibrationError: the recipe needs statistics, or they are of another checkpoint or say
            nothing about an input.
    """
    options = config or QuantizeConfig()
    require_float(bundle)
    bundle.require_weights("quantization")
    plain = {name: build_graph(name, bundle.config, bundle.dtype) for name in GRAPH_FILES}
    parts = {p.name: p for name in plain for p in parts_of(bundle.config, name)}
    _require_weights(bundle, plain)
    recipe.check(tuple(parts.values()))
    weights = {name: how for name, part in parts.items() if (how := recipe.format_of(part))}
    wanted = {
        tap.weight: weights[tap.weight].dtype
        for graph in plain.values()
        for tap in graph.taps
        if tap.weight in parts and recipe.rounds_input_of(parts[tap.weight])
    }
    activations: dict[str, ActivationFormat] = {}
    if wanted:
        if statistics is None:
            raise CalibrationError(
                f"recipe {recipe.name!r} rounds the inputs of products and needs their ranges",
                found="no statistics were given",
                do=f"make some with `twotower calibrate {bundle.path} --prompts FILE -o stats`, then add --stats stats",
            )
        _require_same_source(bundle, statistics)
        scales = activation_scales(
            statistics, wanted, ranges=options.ranges, clean_text=options.calibrated_on == "text"
        )
        activations = {
            name: ActivationFormat(dtype, scales[name] / ACTIVATIONS[dtype])
            for name, dtype in wanted.items()
        }
    precision = Precision(weights, activations)
    graphs = {
        name: build_graph(name, bundle.config, bundle.dtype, precision) for name in GRAPH_FILES
    }
    return Plan(
        recipe, options, precision, graphs, statistics.sha256 if statistics and wanted else None
    )


def quantize_bundle(
    bundle: Bundle,
    plan: Plan,
    output: Path,
    *,
    report: Report | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes the quantized bundle; its folder appears whole or not at all.

    Memory stays at a few pieces of a million weights, whatever the model; the weights are read from
    the bundle's mapped files.

    Args:
        bundle: The float bundle.
        plan: From `plan_quantization`.
        output: The folder to make.
        report: Called with (what, bytes done, bytes in all).
        extra: More facts for the manifest's `quantization`.

    Raises:
        BundleError: the folder exists, the disk is too small or fails.
    """
    require_room(output, plan.nbytes, error=BundleError, smaller="or choose another disk with -o")
    tell = report or (lambda what, done, total: None)
    notes = []
    for name, graph in plan.graphs.items():
        do = "report this: it is a defect of twotower; nothing was written"
        notes += [
            {"graph": name, **note.to_json()}
            for note in require_clean(
                ir.to_proto(graph.model), f"the quantized {name} graph", error=BundleError, do=do
            )
        ]
    try:
        with unpublished(output) as folder:
            _write(folder, bundle, plan, notes=notes, tell=tell, extra=extra or {})
    except OSError as e:
        raise BundleError(
            f"quantizing to '{output}' failed while writing",
            found=str(e),
            do="free disk space or check permissions; nothing was left behind",
        ) from e
    return Bundle.open(output, contents=False)


def _write(
    folder: Path,
    bundle: Bundle,
    plan: Plan,
    *,
    notes: list[dict[str, Any]],
    tell: Report,
    extra: Mapping[str, Any],
) -> None:
    files: dict[str, FileRecord] = {}
    done, total = 0, plan.nbytes

    def tick(count: int) -> None:
        nonlocal done
        done += count
        tell("quantizing weights", min(done, total), total)

    for name, relative in GRAPH_FILES.items():
        graph, data = plan.graphs[name], relative + DATA_SUFFIX
        (folder / relative).parent.mkdir(exist_ok=True)
        refs = bundle.weights(name)
        places = lay_out(graph.weights)
        if any(w.format for w in graph.weights):
            source = (bundle.path / data, refs)
            how = plan.config.rounding
            files[data] = stream_quantized(
                folder / data, graph.weights, source, bundle.dtype, rounding=how, tick=tick
            )
        else:  # nothing of this graph changes: its weights stay where the export, maybe of another version, put them
            link_file(bundle.path / data, folder / data)
            files[data], places = bundle.files[data], {w.name: refs[w.name] for w in graph.weights}
            tick(sum(w.nbytes for w in graph.weights))
        save_program(folder / relative, graph, places)
    for file in bundle.files:
        if file.startswith("tokenizer/"):
            (folder / file).parent.mkdir(exist_ok=True)
            link_file(bundle.path / file, folder / file)
            files[file] = bundle.files[file]
    (folder / REPORT_FILE).parent.mkdir(exist_ok=True)
    write_json(folder / REPORT_FILE, {"quantized_from": bundle.path.name, "notes": notes})
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        if relative not in files:
            files[relative] = FileRecord(path.stat().st_size, hash_file(path))
    write_json(folder / MANIFEST_FILE, _manifest(bundle, plan, files, extra))


def _manifest(
    bundle: Bundle, plan: Plan, files: Mapping[str, FileRecord], extra: Mapping[str, Any]
) -> dict[str, Any]:
    manifest = json.loads((bundle.path / MANIFEST_FILE).read_text(encoding="utf-8"))
    parts = {p.name: p for name in GRAPH_FILES for p in parts_of(bundle.config, name)}
    labels: dict[str, set[str]] = {}
    for part in parts.values():
        how = plan.recipe.format_of(part)
        rounded = plan.recipe.rounds_input_of(part)
        labels.setdefault(part.kind, set()).add(
            (how.label + (", inputs too" if rounded else "")) if how else bundle.dtype
        )
    manifest["precision"] |= {kind: " / ".join(sorted(found)) for kind, found in labels.items()}
    manifest["twotower"] = __version__
    manifest["requires"] = sorted({*bundle.requires, "quantization"})
    manifest["quantization"] = {
        "recipe": {"name": plan.recipe.name, **plan.recipe.to_json()},
        "options": asdict(plan.config),
        "formats": sorted({how.name for how in plan.precision.weights.values()}),
        "activations": {
            name: {"dtype": how.dtype, "scale": how.scale}
            for name, how in plan.precision.activations.items()
        },
        "statistics": plan.statistics,
        "source": source_identity(bundle),
        "measured": None,
        **extra,
    }
    manifest["files"] = {
        name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(files.items())
    }
    return dict(manifest)


def source_identity(bundle: Bundle) -> dict[str, str]:
    """What says that a quantized bundle was made from this one: the identity of its graphs and weights."""
    return {name: bundle.graph_identity(name) for name in GRAPH_FILES}


def _require_weights(bundle: Bundle, graphs: Mapping[str, TowerGraph]) -> None:
    """The bundle must hold what this version's graphs declare, in the same shapes and types."""
    for name, graph in graphs.items():
        held = bundle.weights(name)
        wrong = [
            w.name
            for w in graph.weights
            if w.name not in held or (held[w.name].shape, held[w.name].dtype) != (w.shape, w.dtype)
        ]
        if wrong:
            raise BundleError(
                f"bundle '{bundle.path}' was exported by another version of twotower",
                found=f"its {name} graph does not have {', '.join(wrong[:3])} as this version writes it",
                do="export the checkpoint again with this version",
            )


def precision_of(bundle: Bundle) -> Precision:
    """What of a quantized bundle is in few bits, as its manifest says."""
    facts = bundle.quantization
    assert facts is not None
    recipe = Recipe.from_mapping(
        facts["recipe"]["name"], {k: v for k, v in facts["recipe"].items() if k != "name"}
    )
    parts = (p for name in GRAPH_FILES for p in parts_of(bundle.config, name))
    weights = {part.name: how for part in parts if (how := recipe.format_of(part))}
    return Precision(
        weights,
        {
            name: ActivationFormat(a["dtype"], a["scale"])
            for name, a in facts["activations"].items()
        },
    )


def _require_same_source(bundle: Bundle, statistics: Statistics) -> None:
    if statistics.source != identity_of(bundle):
        raise CalibrationError(
            f"the statistics in '{statistics.path}' are of another checkpoint",
            found=f"they were made with shards {statistics.source[:12]}..., the bundle holds {identity_of(bundle)[:12]}...",
            do=f"run `twotower calibrate {bundle.path} --prompts FILE -o NEW` and pass that",
        )
