"""Quality and speed of diffusion against the same bundle's own autoregression, as data."""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower import __version__
from twotower.config import GenerationConfig
from twotower.evaluate.measure import Measured, Run, measure
from twotower.evaluate.resampling import Resampler
from twotower.evaluate.suite import Problem, Suite
from twotower.runtime import Score, TwoTower

AR, DEFAULT, OTHER = "ar", "default", "other"
SCHEMA = 1
_EXAMPLES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """What to measure: every pair of commit thresholds and most passes a block (`steps`).

    `budget` is the wanted retention in percent, None asks for none; `likelihood` also scores the
    right answers with the context tower.
    """

    thresholds: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    steps: tuple[int, ...] = (2, 4, 16)
    max_new_tokens: int = 160
    budget: float | None = None
    likelihood: bool = True


def setting_name(threshold: float, steps: int) -> str:
    """How a pair of the sweep is called."""
    return f"{threshold:g}/{steps}"


def evaluate(
    model: TwoTower,
    suite: Suite,
    config: EvaluationConfig,
    *,
    other: TwoTower | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures autoregression, the default preset and the sweep on every problem of a suite.

    The default preset of `other`, a second bundle, is compared with the first one's autoregression
    and default preset. `progress` is called with (what, problems done, problems in all). Returns
    the report as plain data.

    Raises:
        RequestError: a bundle has no tokenizer, or a problem does not fit.
    """
    tell = progress or (lambda what, done, total: None)
    configs = sweep_configs(model, config)
    runs = [Run(name, model, c) for name, c in configs.items()]
    if other is not None:
        configs[OTHER] = measured_preset(other, config.max_new_tokens)
        runs.append(Run(OTHER, other, configs[OTHER]))
    measured = measure(suite.problems, runs, partial(tell, "answering"))
    report: dict[str, Any] = {
        **report_head("twotower-evaluation", suite),
        "settings": {
            name: {
                "config": configs[name].to_json(),
                **summaries(suite.problems, measured[name], measured[AR]),
            }
            for name in configs
        },
        "lost": lost_examples(suite.problems, measured[AR], measured[DEFAULT]),
    }
    if config.likelihood:
        report["likelihood"] = _likelihood(model, suite.problems, tell)
    if other is not None:
        # Against the first bundle's diffusion too: that is what a changed bundle must keep.
        report["other_to_default"] = summaries(
            suite.problems,
            measured[OTHER],
            measured[DEFAULT],
        )
    if config.budget is not None:
        judged = OTHER if other is not None else DEFAULT
        kept = report["settings"][judged]["total"]["retention"]["value"]
        report["budget"] = {
            "percent": config.budget,
            "setting": judged,
            "retention": kept,
            "met": bool(kept and kept >= config.budget),
        }
    return report


def sweep_configs(model: TwoTower, config: EvaluationConfig) -> dict[str, GenerationConfig]:
    """Autoregression, the bundle's default preset, and every pair of the sweep, by name."""
    base = measured_preset(model, config.max_new_tokens)
    out = {AR: replace(base, mode="ar"), DEFAULT: base}
    for steps in config.steps:
        for threshold in config.thresholds:
            out[setting_name(threshold, steps)] = replace(
                base, confidence_threshold=threshold, steps_per_block=steps
            )
    return out


def measured_preset(model: TwoTower, max_new_tokens: int) -> GenerationConfig:
    """A bundle's default preset as it is measured: in diffusion, with a seed."""
    options = model.defaults.seeded()
    return replace(options, mode="diffusion", top_p=1.0, max_new_tokens=max_new_tokens)


def summaries(
    problems: Sequence[Problem], measured: Measured, baseline: Measured
) -> dict[str, Any]:
    """Figures in total, of each kind of task, and of each side of the trained lengths."""

    def of(chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
        return summary(measured.take(chosen), baseline.take(chosen))

    kinds, lengths = np.array([p.kind for p in problems]), np.array([p.length for p in problems])
    return {
        "total": summary(measured, baseline),
        "kinds": {kind: of(kinds == kind) for kind in sorted(set(kinds.tolist()))},
        "lengths": {length: of(lengths == length) for length in sorted(set(lengths.tolist()))},
    }


def summary(m: Measured, baseline: Measured) -> dict[str, Any]:
    """Quality, passes and speed of some problems; speeds count the prompt's time in."""
    draws = Resampler(len(m.right))
    exact = draws.interval(
        lambda right, count: 100 * right / count,
        m.right,
        np.ones(len(m.right)),
    )
    retention = draws.interval(
        lambda a, b: 100 * a / b,
        m.right,
        baseline.right,
    )
    speedup = draws.interval(
        lambda t, ms, bt, bms: (t / ms) / (bt / bms), m.tokens, m.ms, baseline.tokens, baseline.ms
    )
    blocks = int(m.blocks.sum())
    nfe = int(m.nfe.sum())
    tokens = int(m.tokens.sum())
    seconds = float(m.ms.sum()) / 1000
    return {
        "problems": len(m.right),
        "right": int(m.right.sum()),
        "exact": exact,
        "degenerate": int(m.degenerate.sum()),
        "retention": retention,
        "lost": int((baseline.right & ~m.right).sum()),
        "won": int((m.right & ~baseline.right).sum()),
        "tokens": tokens,
        "passes": nfe,
        "passes_per_block": round(nfe / blocks, 4) if blocks else None,
        "tokens_per_pass": round(tokens / nfe, 4) if nfe else None,
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "seconds": round(seconds, 4),
        "prefill_seconds": round(float(m.prefill_ms.sum()) / 1000, 4),
        "speedup": speedup,
    }


def report_head(kind: str, suite: Suite) -> dict[str, Any]:
    """What every report begins with: what it is, the machine, and the suite."""
    return {
        "schema": SCHEMA,
        "kind": kind,
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
    }


def origin_text(report: Mapping[str, Any]) -> str:
    """What a report was made of and with, for the foot of its page."""
    suite = report["suite"]
    return (
        f"Suite {suite['name']} {suite['sha256'][:12]}, twotower {report['twotower']}, "
        f"Python {report['machine']['python']}."
    )


def lost_examples(
    problems: Sequence[Problem], before: Measured, after: Measured
) -> list[dict[str, str]]:
    """Problems that were solved before and are not after: what to look at first."""
    return [
        {
            "id": problems[i].id,
            "kind": problems[i].kind,
            "prompt": problems[i].prompt,
            "answer": problems[i].answer,
            "diffusion": after.texts[i],
        }
        for i in np.flatnonzero(before.right & ~after.right)[:_EXAMPLES]
    ]


def _likelihood(
    model: TwoTower, problems: Sequence[Problem], tell: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Log-likelihood of the right answers under the context tower."""
    scores, of_kind = [], defaultdict(list)
    for i, p in enumerate(problems):
        scores.append(model.score((p.prompt, f" {p.answer}")))
        of_kind[p.kind].append(scores[-1])
        tell("scoring likelihoods", i + 1, len(problems))
    tokens, nats = _nats_per_token(scores)
    return {
        "nats_per_token": round(nats, 6) if tokens else None,
        "perplexity": round(math.exp(nats), 5) if tokens else None,
        "bounded_tokens": sum(s.bounded for s in scores),
        "tokens": tokens,
        "greedy": round(100 * sum(s.greedy for s in scores) / len(scores), 2),
        "kinds": {k: round(_nats_per_token(of_kind[k])[1], 6) for k in sorted(of_kind)},
    }


def _nats_per_token(scores: Sequence[Score]) -> tuple[int, float]:
    tokens = sum(len(s.logprobs) for s in scores)
    return tokens, -sum(s.total for s in scores) / max(tokens, 1)
