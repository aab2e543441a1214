"""Quantized bundles of the model that comes along, made once a test run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tests.helpers.source import ROOT
from twotower.builders import build_engines, builder_for
from twotower.bundle import Bundle
from twotower.calibration import QuantizeConfig, load_recipe, plan_quantization, quantize_bundle
from twotower.calibration.activation_statistics import Statistics, read_statistics

TINY = ROOT / "assets" / "twotower-tiny"
SUITE = ROOT / "src" / "twotower" / "evaluate" / "data" / "suite.jsonl"


@cache
def suite_prompts(count: int) -> tuple[str, ...]:
    """Prompts of the suite, of all kinds."""
    lines = SUITE.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["prompt"] for line in lines[:: len(lines) // count])[:count]


def quantized(
    bundle: Path, folder: Path, recipe: str, *, stats: Path | None = None, rounding: str = "plain"
) -> Bundle:
    """A quantized bundle with an ort-cpu engine; made once for a folder."""
    path = folder / f"{recipe}-{rounding}"
    if not path.exists():
        source = Bundle.open(bundle)
        statistics: Statistics | None = read_statistics(stats) if stats else None
        plan = plan_quantization(
            source, load_recipe(recipe), QuantizeConfig(rounding=rounding), statistics
        )
        made = quantize_bundle(source, plan, path)
        build_engines(made, "ort-cpu", builder_for("ort-cpu"))
    return Bundle.open(path)
