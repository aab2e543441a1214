"""Quantized graphs built by TensorRT for RTX, without a GPU: every recipe for every compute capability whose hardware has its formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.errors import fails
from tests.helpers.quantized import TINY
from tests.helpers.trt.execution import fake_kernels
from twotower.builders import BuildConfig, build_engines, builder_for
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.bundle import GRAPH_FILES, Bundle
from twotower.calibration import builtin_recipes, plan_quantization, quantize_bundle
from twotower.calibration.activation_statistics import read_statistics
from twotower.config.formats import FORMATS, stack_is_expanded
from twotower.errors import BuildError
from twotower.export import Checkpoint, ExportConfig, export_bundle

pytestmark = [pytest.mark.trt_rtx, pytest.mark.slow]
SMS = (86, 89, 120)
FIRST = {
    "int8-weights": 86,
    "int8": 86,
    "fp8": 89,
    "int4-experts": 86,
    "nvfp4-experts": 120,
    "mixed": 86,
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_statistics: Path) -> Any:
    """Bundles in bfloat16, as the published model is."""
    folder = tmp_path_factory.mktemp("recipes")
    half = export_bundle(Checkpoint.open(TINY), folder / "half", ExportConfig(dtype="bfloat16"))

    def of(recipe: str) -> Bundle:
        path = folder / recipe
        if path.exists():
            return Bundle.open(path)
        plan = plan_quantization(
            half, builtin_recipes()[recipe], None, read_statistics(tiny_statistics)
        )
        return quantize_bundle(half, plan, path)

    return of


def build(bundle: Bundle, sms: tuple[int, ...], *, allow_expanded: bool = False) -> Any:
    config = BuildConfig(sms=sms, max_context=256, experts="dense", allow_expanded=allow_expanded)
    return build_engines(bundle, "rtx", builder_for("rtx"), config=config)


def expanded(record: Any, *, stacked: bool) -> list[str]:
    """Scopes of the weights that passes expand in device memory, as the plans' own programs say."""
    engines = record.report["engines"].values()
    programs = [program for engine in engines for program in engine["inspector"]["programs"]]
    return [
        w["scope"] for program in programs for w in program["expanded"] if w["stacked"] == stacked
    ]


@pytest.mark.parametrize("recipe", FIRST)
def test_it_builds_for_the_hardware_that_has_its_formats(quantized: Any, recipe: str) -> None:
    bundle, sms = quantized(recipe), tuple(sm for sm in SMS if sm >= FIRST[recipe])
    record = build(bundle, sms, allow_expanded=True)
    assert record.limits is not None and record.limits.sms == sms
    lines = [line for engine in record.report["engines"].values() for line in engine["log"]]
    assert not [line["message"] for line in lines if not line["explained"]]
    layers = record.report["engines"]["denoiser.engine"]["by_type"]
    assert layers["DEQUANTIZE"] >= 6, "the weights are in few bits in the engine's network too"
    assert ("QUANTIZE" in layers) == (recipe in ("int8", "fp8"))
    weights = sum((bundle.path / f"{graph}.data").stat().st_size for graph in GRAPH_FILES.values())
    engines = sum(engine["bytes"] for engine in record.report["engines"].values())
    assert engines > weights, "nothing of the weights is left out"


@pytest.mark.parametrize("recipe", FIRST)
def test_experts_stay_in_their_product_or_the_build_is_refused(quantized: Any, recipe: str) -> None:
    """`stack_is_expanded` is what `plan` recommends by; the compiled programs are the truth."""
    bundle, sms = quantized(recipe), tuple(sm for sm in SMS if sm >= FIRST[recipe])
    made = builtin_recipes()[recipe]
    told = stack_is_expanded(
        "rtx", made.weights["routed_expert"], rounded_input="routed_expert" in made.activations
    )
    assert told == (recipe in ("int8-weights", "nvfp4-experts")), (
        "or plans recommend what is slower"
    )
    record = build(bundle, sms, allow_expanded=True)
    moe = [f"layers.{i}.moe" for i, kind in enumerate(bundle.config.layers) if kind.name == "MOE"]
    towers = (*record.engines["context"], *record.engines["denoiser"])
    profiles = sum(len(engine.profiles) for engine in towers)
    assert sorted(expanded(record, stacked=True)) == sorted(moe * 2 * profiles if told else [])
    if not told:
        assert build(bundle, sms) == record
        # At this width, and not at published ones, decode joins the rows of dt to the other rows of
        # Mamba's first projection.
        assert {scope.rpartition(".")[2] for scope in expanded(record, stacked=False)} <= {"mamba"}
        return
    with fails(
        BuildError,
        r"context\.engine expands the experts of 3 layer\(s\)",
        found="iB a pass: layers.2.moe, ",
        do=("recipes mixed", "--allow-expanded"),
    ):
        build(bundle, sms)
    assert build(bundle, sms, allow_expanded=True) == record, (
        "the refusal left the engines that somebody insisted on"
    )


@pytest.mark.parametrize("recipe", FIRST)
def test_kernels_between_programs_read_experts_of_every_recipe(quantized: Any, recipe: str) -> None:
    """Nothing of them is in an engine, and no format of theirs keeps a GPU out: the others' may."""
    recipes = builtin_recipes()[recipe].weights
    others = [
        FORMATS[name].first_sm for kind, name in recipes.items() if not kind.endswith("_expert")
    ]
    builder = TensorRTBuilder(builder_for("rtx").variant, fake_kernels)  # type: ignore[attr-defined]
    config = BuildConfig(sms=(max(86, *others, 0),), max_context=256, force=True)
    record = build_engines(quantized(recipe), "rtx", builder, config=config)
    assert record.report["choice_of_experts"] == {"computed_by": "kernels"}
    programs = [part for parts in record.engines.values() for part in parts]
    assert not [name for part in programs for name in part.constants if "experts" in name]
    assert not expanded(record, stacked=True)


@pytest.mark.parametrize("recipe", [name for name, first in FIRST.items() if first > 86])
def test_other_hardware_is_refused_before_and_would_be_by_the_library(
    quantized: Any, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantized(recipe)
    for sm in (sm for sm in SMS if sm < FIRST[recipe]):
        with fails(
            BuildError, f"SM {sm} has no hardware for the formats", found=f"from SM {FIRST[recipe]}"
        ):
            build(bundle, (sm,))
        with (
            monkeypatch.context() as patched
        ):  # the rule is not stricter than the library it stands for
            patched.setattr(Bundle, "formats", property(lambda self: ()))
            with fails(BuildError, "cannot build this graph", found="HW-specific datatypes"):
                build(bundle, (sm,))


def test_without_a_choice_it_is_built_for_all_that_can(quantized: Any) -> None:
    plan = TensorRTBuilder(builder_for("rtx").variant).plan(
        quantized("fp8"), BuildConfig(max_context=256, experts="dense")
    )  # type: ignore[attr-defined]
    assert plan.limits.sms == (89, 120)
