"""What a recipe makes of a bundle: graphs recorded with quantized weights; none is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from twotower.bundle import GRAPH_FILES, Bundle
from twotower.calibration.activation_statistics import Statistics, identity_of
from twotower.calibration.ranges import activation_ranges
from twotower.calibration.recipes import QuantizableWeight, Recipe, quantizable_weights
from twotower.calibration.weight_quantization import ROUNDINGS
from twotower.config.formats import ACTIVATIONS, WeightFormat
from twotower.errors import BundleError, CalibrationError, ConfigError
from twotower.export.graphs.precision import ActivationFormat, Precision
from twotower.export.graphs.tower_graphs import TowerGraph, build_graph
from twotower.records import decode

RANGES = ("max", "percentile", "mse")
SOURCES = ("trajectories", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Options of one quantization.

    Attributes:
        rounding: How weights are quantized: one of `ROUNDINGS`.
        ranges: How an input's range is read from its histogram: `max`, `percentile` (99.99 %) or
            `mse` (the clipping with the least error, for integers).
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
class QuantizationPlan:
    """The graphs to write, and the precision they were recorded with.

    `statistics` is the SHA-256 of the statistics the ranges are from; None without any.
    """

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
    """Refuses a bundle that is quantized already (BundleError)."""
    if bundle.quantization is not None:
        recipe = bundle.quantization["recipe"]["name"]
        raise BundleError(
            f"bundle '{bundle.path}' is quantized already",
            found=f"recipe {recipe}; a second quantization would add to the errors of the first",
            do="quantize the bundle it was made from",
        )


def plan_quantization(
    bundle: Bundle,
    recipe: Recipe,
    config: QuantizeConfig | None = None,
    statistics: Statistics | None = None,
) -> QuantizationPlan:
    """Records the graphs a recipe leads to; reads no weight.

    Raises:
        BundleError: the bundle is quantized already.
        RecipeError: the recipe does not fit the model.
        CalibrationError: the recipe quantizes inputs and the statistics are missing, of another
            checkpoint, or silent about an input.
    """
    options = config or QuantizeConfig()
    require_float(bundle)
    bundle.require_weights("quantization")
    plain = _graphs(bundle)
    _require_weights(bundle, plain)
    quantizable = quantizable_of(bundle)
    recipe.check(tuple(quantizable.values()))
    weights = _formats(recipe, quantizable)
    wanted = {
        tap.weight: weights[tap.weight].dtype
        for graph in plain.values()
        for tap in graph.taps
        if tap.weight in quantizable and recipe.quantizes_input_of(quantizable[tap.weight])
    }
    activations: dict[str, ActivationFormat] = {}
    if wanted:
        if statistics is None:
            command = f"twotower calibrate {bundle.path} --prompts FILE -o stats"
            raise CalibrationError(
                f"recipe {recipe.name!r} quantizes the inputs of products and needs their ranges",
                found="no statistics were given",
                do=f"make some with `{command}`, then add --stats stats",
            )
        _require_same_source(bundle, statistics)
        clean_text = options.calibrated_on == "text"
        ranges = activation_ranges(statistics, wanted, ranges=options.ranges, clean_text=clean_text)
        for name, dtype in wanted.items():
            activations[name] = ActivationFormat(dtype, ranges[name] / ACTIVATIONS[dtype])
    precision = Precision(weights, activations)
    sha256 = statistics.sha256 if statistics and wanted else None
    return QuantizationPlan(recipe, options, precision, _graphs(bundle, precision), sha256)


def precision_of(bundle: Bundle) -> Precision:
    """Formats of a quantized bundle's weights and activations, as its manifest says."""
    facts = bundle.quantization
    assert facts is not None
    described = {key: value for key, value in facts["recipe"].items() if key != "name"}
    recipe = Recipe.from_mapping(facts["recipe"]["name"], described)
    activations = decode(dict[str, ActivationFormat], facts["activations"])
    return Precision(_formats(recipe, quantizable_of(bundle)), activations)


def quantizable_of(bundle: Bundle) -> dict[str, QuantizableWeight]:
    """The weights of a bundle's model that recipes are about, by name."""
    found = [w for graph in GRAPH_FILES for w in quantizable_weights(bundle.config, graph)]
    return {weight.name: weight for weight in found}


def _graphs(bundle: Bundle, precision: Precision | None = None) -> dict[str, TowerGraph]:
    return {name: build_graph(name, bundle.config, bundle.dtype, precision) for name in GRAPH_FILES}


def _formats(recipe: Recipe, weights: Mapping[str, QuantizableWeight]) -> dict[str, WeightFormat]:
    found = {name: recipe.format_of(weight) for name, weight in weights.items()}
    return {name: how for name, how in found.items() if how is not None}


def _require_weights(bundle: Bundle, graphs: Mapping[str, TowerGraph]) -> None:
    """The bundle must hold what this version's graphs declare, in the same shapes and types."""
    for name, graph in graphs.items():
        held = {key: (ref.shape, ref.dtype) for key, ref in bundle.weights(name).items()}
        wrong = [w.name for w in graph.weights if held.get(w.name) != (w.shape, w.dtype)]
        if wrong:
            listed = ", ".join(wrong[:3])
            raise BundleError(
                f"bundle '{bundle.path}' was exported by another version of twotower",
                found=f"its {name} graph does not have {listed} as this version writes it",
                do="export the checkpoint again with this version",
            )


def _require_same_source(bundle: Bundle, statistics: Statistics) -> None:
    source, held = statistics.source, identity_of(bundle)
    if source != held:
        raise CalibrationError(
            f"the statistics in '{statistics.path}' are of another checkpoint",
            found=f"made with shards {source[:12]}..., the bundle holds {held[:12]}...",
            do=f"run `twotower calibrate {bundle.path} --prompts FILE -o NEW` and pass that",
        )
