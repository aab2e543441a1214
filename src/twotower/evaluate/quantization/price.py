"""What quantization costs and brings: quality kept, passes a block before and after, the time of a pass, and which kind is to blame."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from twotower import __version__
from twotower.evaluate.evaluation import summaries, summary
from twotower.evaluate.measure import Contestant, Measured, measure
from twotower.evaluate.resampling import Resampler
from twotower.evaluate.suite import Problem, Suite
from twotower.runtime import TwoTower

__all__ = [
    "FLOAT",
    "FLOAT_AR",
    "QUANTIZED",
    "QUANTIZED_AR",
    "PriceConfig",
    "compared",
    "flags_of",
    "measure_price",
]

FLOAT, QUANTIZED, FLOAT_AR, QUANTIZED_AR = "float", "quantized", "float ar", "quantized ar"
KIND = "twotower-quantization"
SCHEMA = 1
_EXAMPLES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceConfig:
    """What is asked for.

    Attributes:
        max_new_tokens: Longest answer.
        budget: Percent of the float bundle's right answers to keep.
        max_inflation: Percent of more passes a block that are accepted.
    """

    max_new_tokens: int = 160
    budget: float = 98.7
    max_inflation: float = 5.0


def measure_price(
    reference: TwoTower,
    quantized: TwoTower,
    suite: Suite,
    config: PriceConfig,
    *,
    variants: Mapping[str, TwoTower] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answers every problem with both bundles, in both modes, and with each variant, in turn.

    Args:
        reference: The float bundle.
        quantized: The bundle made from it.
        suite: The problems.
        config: What is asked for.
        variants: By layer kind the model in which that kind alone is quantized.
        progress: Called with (problems done, problems in all).

    Returns:
        The report: plain data.

    Raises:
        RequestError: a bundle has no tokenizer, or a problem does not fit.
    """
    options = reference.defaults.seeded()
    base = replace(options, mode="diffusion", top_p=1.0, max_new_tokens=config.max_new_tokens)
    contestants = [
        Contestant(FLOAT, reference, base),
        Contestant(QUANTIZED, quantized, base),
        Contestant(FLOAT_AR, reference, replace(base, mode="ar")),
        Contestant(QUANTIZED_AR, quantized, replace(base, mode="ar")),
        *(Contestant(kind, model, base) for kind, model in (variants or {}).items()),
    ]
    measured = measure(suite.problems, contestants, progress)
    before, after = measured[FLOAT], measured[QUANTIZED]
    result = compared(after, before)
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "twotower": __version__,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "suite": {
            "name": suite.name,
            "sha256": suite.sha256,
            "problems": len(suite.problems),
            "kinds": list(suite.kinds),
        },
        "generation": base.to_json(),
        "budget": {"percent": config.budget, "max_inflation": config.max_inflation},
        "settings": {
            FLOAT: summaries(suite.problems, before, before),
            QUANTIZED: summaries(suite.problems, after, before),
            FLOAT_AR: summaries(suite.problems, measured[FLOAT_AR], measured[FLOAT_AR]),
            QUANTIZED_AR: summaries(suite.problems, measured[QUANTIZED_AR], measured[FLOAT_AR]),
        },
        "compared": result,
        "tasks": _tasks(suite.problems, after, before),
        "sensitivity": {kind: compared(measured[kind], before) for kind in variants or {}},
        "flags": flags_of(result, config),
        "lost": _examples(suite.problems, after, before),
    }


def compared(after: Measured, before: Measured) -> dict[str, Any]:
    """Ratios of a changed model to the original one on the same problems, each with its interval.

    `inflation` is passes a block over passes a block; `step_time` how much faster a pass is, the
    context tower's share and everything but the prompt counted in; `speedup` their quotient: what
    is left of a faster pass when more of them are needed. Tokens a second, which texts of another
    length move too, are in `tokens_per_second`.
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
        "same_text": sum(a == b for a, b in zip(after.texts, before.texts, strict=True)),
        "problems": len(after.right),
        "passes_per_block": [
            summary(before, before)["passes_per_block"],
            figures["passes_per_block"],
        ],
        "inflation": inflation.to_json(),
        "step_time": step.to_json(),
        "speedup": speed.to_json(),
        "tokens_per_second": figures["speedup"],
    }


def flags_of(result: Mapping[str, Any], config: PriceConfig) -> list[str]:
    """What a user of the bundle must know, a sentence each; none for a bundle inside the budget."""
    out = []
    kept, inflation = result["retention"]["value"], result["inflation"]["value"]
    if kept is None or kept < config.budget:
        out.append(
            f"keeps {_percent(kept)} of the float bundle's right answers, below the budget of {config.budget:g} %"
        )
    if inflation is None or inflation > 1 + config.max_inflation / 100 + 1e-9:
        more = math.nan if inflation is None else 100 * (inflation - 1)
        out.append(
            f"needs {more:.1f} % more passes a block than the float bundle, above the accepted {config.max_inflation:g} %"
        )
    return out


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f} %"


def _tasks(problems: Sequence[Problem], after: Measured, before: Measured) -> dict[str, Any]:
    kinds = np.array([p.kind for p in problems])
    return {
        kind: compared(after.take(kinds == kind), before.take(kinds == kind))
        for kind in sorted(set(kinds.tolist()))
    }


def _examples(
    problems: Sequence[Problem], after: Measured, before: Measured
) -> list[dict[str, str]]:
    lost = [i for i in range(len(problems)) if before.right[i] and not after.right[i]]
    return [
        {
            "id": p.id,
            "kind": p.kind,
            "prompt": p.prompt,
            "answer": p.answer,
            "diffusion": after.texts[i],
        }
        for i in lost[:_EXAMPLES]
        for p in [problems[i]]
    ]
