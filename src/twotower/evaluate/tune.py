"""The fastest settings inside a quality budget, chosen on half of the problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from twotower.config import GenerationConfig
from twotower.errors import BudgetError, ConfigError
from twotower.evaluate.evaluation import AR, EvaluationConfig, setting_name, summary, sweep_configs
from twotower.evaluate.measure import Measured, Run, measure
from twotower.evaluate.suite import Suite
from twotower.runtime import TwoTower
from twotower.runtime.auto import Setting, setting_of

PRESETS = ("quality", "balanced", "fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """What to search, and for what: every pair of `thresholds` and most passes a block (`steps`).

    `budget` is the percent of autoregression's right answers that `balanced` must keep; `loose` the
    percentage points that `fast` may lose beyond it.
    """

    budget: float = 98.7
    loose: float = 5.0
    thresholds: tuple[float, ...] = (
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.85,
        0.9,
        0.925,
        0.95,
        0.97,
        0.98,
        0.99,
    )
    steps: tuple[int, ...] = (3, 4, 6, 16)
    max_new_tokens: int = 160

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 100 or self.loose < 0:
            found = f"budget {self.budget}, loose {self.loose}"
            raise ConfigError(
                "this budget cannot be asked for",
                found=found,
                do="name a budget of more than 0, up to 100 percent",
            )


@dataclass(frozen=True, slots=True)
class Tuned:
    """The chosen presets by name, and all that was measured, as plain data.

    `passes` has passes a block of each setting, and the blocks they are the mean of.
    """

    presets: dict[str, GenerationConfig]
    report: dict[str, Any]
    passes: dict[Setting, tuple[float, int]]

    @property
    def holds(self) -> bool:
        """Whether `balanced` is inside the budget on the problems it was not chosen with, too."""
        return bool(
            self.report["presets"]["balanced"]["check"]["retention"]["value"]
            >= self.report["budget"]
        )


def tune(
    model: TwoTower,
    suite: Suite,
    config: TuneConfig | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Measures every pair of the grid and names three of them.

    `balanced` is the fastest inside the budget, `quality` the fastest of those that lose least,
    `fast` the fastest inside a looser budget. A pair is inside only if every stricter threshold
    with as many steps is too: a lucky one between two that fail would not hold elsewhere.

    Raises:
        BudgetError: no pair is inside the budget; names the best found.
        RequestError: the bundle has no tokenizer, or a problem does not fit.
    """
    options = config or TuneConfig()
    grid = EvaluationConfig(
        thresholds=options.thresholds, steps=options.steps, max_new_tokens=options.max_new_tokens
    )
    configs = sweep_configs(model, grid)
    tell = progress or (lambda what, done, total: None)
    runs = [Run(name, model, c) for name, c in configs.items()]
    halves = suite.halves()
    problems = halves[0].problems + halves[1].problems
    measured = measure(problems, runs, partial(tell, "answering"))
    first = np.arange(len(problems)) < len(halves[0].problems)
    chosen_on = {name: m.take(first) for name, m in measured.items()}
    checked_on = {name: m.take(~first) for name, m in measured.items()}
    found = _choose(chosen_on, options)
    report = {
        "budget": options.budget,
        "suite": {
            "name": suite.name,
            "sha256": suite.sha256,
            "problems": len(problems),
            "chosen_on": int(first.sum()),
        },
        "presets": {
            preset: {
                "setting": name,
                "config": configs[name].to_json(),
                "choice": summary(chosen_on[name], chosen_on[AR]),
                "check": summary(checked_on[name], checked_on[AR]),
            }
            for preset, name in found.items()
        },
        "grid": {name: summary(chosen_on[name], chosen_on[AR]) for name in configs},
    }
    # The longest answer and the seed are the request's business, not the preset's.
    most, seed = model.defaults.max_new_tokens, model.defaults.seed
    chosen = {preset: configs[name] for preset, name in found.items()}
    presets = {p: replace(c, max_new_tokens=most, seed=seed) for p, c in chosen.items()}
    return Tuned(presets, report, _passes(configs, measured))


def _passes(
    configs: dict[str, GenerationConfig],
    measured: dict[str, Measured],
) -> dict[Setting, tuple[float, int]]:
    """What mode `auto` starts from: every request ran alone."""
    out = {}
    for name, config in configs.items():
        blocks = int(measured[name].blocks.sum())
        if blocks:
            passes = float(measured[name].nfe.sum()) / blocks
            out[setting_of(config)] = (passes, blocks)
    return out


def _choose(measured: dict[str, Measured], options: TuneConfig) -> dict[str, str]:
    ar = measured[AR]
    kept = {
        (threshold, steps): 100
        * float(measured[setting_name(threshold, steps)].right.sum())
        / max(float(ar.right.sum()), 1.0)
        for threshold in options.thresholds
        for steps in options.steps
    }
    rate = {}
    for pair in kept:
        m = measured[setting_name(*pair)]
        rate[pair] = float(m.tokens.sum() / m.ms.sum())

    def inside(budget: float) -> list[tuple[float, int]]:
        return [
            (t, s)
            for t, s in kept
            if all(v >= budget for (u, z), v in kept.items() if z == s and u >= t)
        ]

    within = inside(options.budget)
    if not within:
        best = max(kept, key=lambda pair: (kept[pair], rate[pair]))
        raise BudgetError(
            f"no setting keeps {options.budget:g} % of autoregression's right answers",
            found=f"the best of {len(kept)} is threshold {best[0]:g} with {best[1]} steps: "
            f"{kept[best]:.2f} %",
            do="lower --budget, or try higher --thresholds and more --steps",
        )
    most = max(kept[pair] for pair in within)
    choice = {
        "quality": max((p for p in within if kept[p] == most), key=rate.__getitem__),
        "balanced": max(within, key=rate.__getitem__),
        "fast": max(inside(options.budget - options.loose), key=rate.__getitem__),
    }
    return {preset: setting_name(*pair) for preset, pair in choice.items()}
