"""The impact of quantization on quality, passes a block and the time of a pass, by layer kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twotower.evaluate.evaluation import (
    lost_examples,
    measured_preset,
    report_head,
    summaries,
    summary,
)
from twotower.evaluate.measure import Measured, Run, measure
from twotower.evaluate.resampling import Interval, Resampler
from twotower.evaluate.suite import Suite
from twotower.runtime import TwoTower

FLOAT, QUANTIZED, FLOAT_AR, QUANTIZED_AR = "float", "quantized", "float ar", "quantized ar"
KIND = "twotower-quantization"
_NOTED = ("retention", "passes_per_block", "inflation", "step_time", "speedup")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImpactConfig:
    """What is asked for: percent of right answers to keep, and percent of more passes accepted."""

    max_new_tokens: int = 160
    budget: float = 98.7
    max_inflation: float = 5.0


def measure_impact(
    reference: TwoTower,
    quantized: TwoTower,
    suite: Suite,
    config: ImpactConfig,
    *,
    variants: Mapping[str, TwoTower] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answers every problem with both bundles, in both modes, and with each variant, in turn.

    `variants` has by layer kind the model in which that kind alone is quantized; `progress` is
    called with (problems done, problems in all). Returns the report as plain data.

    Raises:
        RequestError: a bundle has no tokenizer, or a problem does not fit.
    """
    base = measured_preset(reference, config.max_new_tokens)
    runs = [
        Run(FLOAT, reference, base),
        Run(QUANTIZED, quantized, base),
        Run(FLOAT_AR, reference, replace(base, mode="ar")),
        Run(QUANTIZED_AR, quantized, replace(base, mode="ar")),
        *(Run(kind, model, base) for kind, model in (variants or {}).items()),
    ]
    measured = measure(suite.problems, runs, progress)
    before, after = measured[FLOAT], measured[QUANTIZED]
    result = compared(after, before)
    kinds = np.array([p.kind for p in suite.problems])
    return {
        **report_head(KIND, suite),
        "generation": base.to_json(),
        "budget": {"percent": config.budget, "max_inflation": config.max_inflation},
        "settings": {
            FLOAT: summaries(suite.problems, before, before),
            QUANTIZED: summaries(suite.problems, after, before),
            FLOAT_AR: summaries(suite.problems, measured[FLOAT_AR], measured[FLOAT_AR]),
            QUANTIZED_AR: summaries(suite.problems, measured[QUANTIZED_AR], measured[FLOAT_AR]),
        },
        "compared": result,
        "tasks": {
            kind: compared(after.take(kinds == kind), before.take(kinds == kind))
            for kind in suite.kinds
        },
        "sensitivity": {kind: compared(measured[kind], before) for kind in variants or {}},
        "flags": flags_of(result, config),
        "lost": lost_examples(suite.problems, before, after),
    }


def note_of(report: Mapping[str, Any], figures: Mapping[str, Any], target: str) -> dict[str, Any]:
    """What of a report, with the `figures` that were `compared`, a bundle's manifest is to hold."""
    return {
        **{name: report[name] for name in ("suite", "generation", "budget", "flags")},
        "target": target,
        **{name: figures[name] for name in _NOTED},
    }


def compared(after: Measured, before: Measured) -> dict[str, Any]:
    """Ratios of a changed model to the original one on the same problems, each with its interval.

    `inflation` is passes a block over passes a block; `step_time` how much faster a pass is, with
    the context tower's share and without the prompt; `speedup` their quotient: what is left of a
    faster pass when more are needed. `tokens_per_second` also depends on the length of texts.
    """
    draws = Resampler(len(after.right))
    spent, spent_before = after.ms - after.prefill_ms, before.ms - before.prefill_ms
    inflation = draws.interval(
        lambda n, b, m, c: (n / b) / (m / c), after.nfe, after.blocks, before.nfe, before.blocks
    )
    step = draws.interval(
        lambda t, n, u, m: (u / m) / (t / n), spent, after.nfe, spent_before, before.nfe
    )
    speed = draws.interval(
        lambda t, n, b, u, m, c: ((u / m) / (t / n)) / ((n / b) / (m / c)),
        *(spent, after.nfe, after.blocks, spent_before, before.nfe, before.blocks),
    )
    figures = summary(after, before)
    return {
        "retention": figures["retention"],
        "lost": figures["lost"],
        "won": figures["won"],
        "same_text": int((after.texts == before.texts).sum()),
        "problems": len(after.right),
        "passes_per_block": [
            summary(before, before)["passes_per_block"],
            figures["passes_per_block"],
        ],
        "inflation": inflation,
        "step_time": step,
        "speedup": speed,
        "tokens_per_second": figures["speedup"],
    }


def more_passes(inflation: Interval) -> Interval:
    """A ratio of passes a block as percent of more of them."""
    return {end: None if ratio is None else 100 * (ratio - 1) for end, ratio in inflation.items()}


def flags_of(result: Mapping[str, Any], config: ImpactConfig) -> list[str]:
    """What a user of the bundle must know, a sentence each; none for a bundle inside the budget."""
    out = []
    kept, inflation = result["retention"]["value"], result["inflation"]["value"]
    if kept is None or kept < config.budget:
        share = "none" if kept is None else f"{kept:.1f} %"
        out.append(
            f"keeps {share} of the float bundle's right answers, "
            f"below the budget of {config.budget:g} %"
        )
    if inflation is None or inflation > 1 + config.max_inflation / 100 + 1e-9:
        more = math.nan if inflation is None else 100 * (inflation - 1)
        out.append(
            f"needs {more:.1f} % more passes a block than the float bundle, "
            f"above the accepted {config.max_inflation:g} %"
        )
    return out
