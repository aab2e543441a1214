"""Tokens a second of both modes on one bundle, measured in turns so that a machine's moods hit both alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import ConfigError
from twotower.runtime import Generation, TwoTower

__all__ = ["GenerationSpeed", "measure_generation", "random_prompts"]


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """Medians of one mode.

    Attributes:
        mode: `diffusion` or `ar`.
        tokens_per_second: New tokens of the whole batch over the whole time, prefill included.
        prefill_ms: Reading the prompts.
        pass_ms: One denoiser pass; in `ar` mode one token.
        tokens_per_nfe: Tokens a pass of one row gave.
        steps_per_block: Passes a block took.
    """

    mode: str
    tokens_per_second: float
    prefill_ms: float
    pass_ms: float
    tokens_per_nfe: float
    steps_per_block: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_generation(model: TwoTower, config: GenerationConfig, *, prompt_tokens: int, rows: int, runs: int) -> list[GenerationSpeed]:
    """Measures diffusion and autoregression on the same random prompts.

    Args:
        model: An opened bundle.
        config: Options; the mode is set here, and end-of-sequence tokens are ignored so that both modes make equally many tokens.
        prompt_tokens: Length of each prompt.
        rows: Prompts generated together.
        runs: Measured runs of each mode, after one that is not counted.

    Raises:
        ConfigError: there would be nothing to measure.
    """
    for name, value in (("--prompt-tokens", prompt_tokens), ("--rows", rows), ("--runs", runs)):
        if value < 1:
            raise ConfigError("nothing to measure", found=f"{name} {value}; allowed: 1 and more", do=f"name a larger {name}")
    config = config.seeded()
    prompts = random_prompts(model.config, prompt_tokens, rows, seed=config.seed)
    configs = [replace(config, mode=mode, ignore_eos=True, top_p=1.0) for mode in ("diffusion", "ar")]
    seen: dict[str, list[list[Generation]]] = {c.mode: [] for c in configs}
    for run in range(runs + 1):
        for options in configs:
            results = model.generate(prompts, options)
            if run:
                seen[options.mode].append(results)
    return [_speed(mode, batches) for mode, batches in seen.items()]


def random_prompts(config: ModelConfig, length: int, rows: int, *, seed: int | None) -> list[list[int]]:
    """Prompts of random tokens, special ones left out."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(config.vocab_size), [config.mask_token_id, config.pad_token_id, *config.eos_token_ids])
    return [rng.choice(words, length).tolist() for _ in range(rows)]


def _speed(mode: str, batches: list[list[Generation]]) -> GenerationSpeed:
    def per_batch(figure: Any) -> float:
        return float(median(figure(batch) for batch in batches))

    return GenerationSpeed(
        mode=mode,
        tokens_per_second=per_batch(lambda b: 1000 * sum(len(r.tokens) for r in b) / max(r.timings.total for r in b)),
        prefill_ms=per_batch(lambda b: b[0].timings.prefill),
        pass_ms=per_batch(lambda b: max((r.timings.denoise if mode == "diffusion" else r.timings.extend) / r.usage.nfe for r in b)),
        tokens_per_nfe=per_batch(lambda b: sum(r.usage.completion_tokens for r in b) / sum(r.usage.nfe for r in b)),
        steps_per_block=per_batch(lambda b: sum(r.usage.steps_per_block for r in b) / len(b)),
    )
