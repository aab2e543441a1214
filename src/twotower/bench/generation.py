"""Tokens a second of both modes on bundles, measured in turns so that a machine's moods hit all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from twotower.config import GenerationConfig, ModelConfig
from twotower.errors import ConfigError
from twotower.runtime import Generation, TwoTower

__all__ = ["GenerationSpeed", "measure_generation", "measure_in_turns", "random_prompts"]


@dataclass(frozen=True, slots=True)
class GenerationSpeed:
    """Medians of one mode.

    Attributes:
        mode: `diffusion` or `ar`.
        tokens_per_second: New tokens of the whole batch over the whole time, prefill included.
        prefill_ms: Reading the prompts.
        pass_ms: One denoiser pass; in `ar` mode one token.
        extend_ms: The context tower over a finished block, 0 where there is one block only; in `ar` mode as `pass_ms`.
        tokens_per_nfe: Tokens a pass of one row gave.
        steps_per_block: Passes a block took.
    """

    mode: str
    tokens_per_second: float
    prefill_ms: float
    pass_ms: float
    extend_ms: float
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
    return measure_in_turns([model], config, prompt_tokens=prompt_tokens, rows=rows, runs=runs)[0]


def measure_in_turns(
    models: Sequence[TwoTower],
    config: GenerationConfig,
    *,
    prompt_tokens: int,
    rows: int,
    runs: int,
) -> list[list[GenerationSpeed]]:
    """Measures several bundles of one vocabulary as `measure_generation` does one; of each its two modes."""
    for name, value in (("--prompt-tokens", prompt_tokens), ("--rows", rows), ("--runs", runs)):
        if value < 1:
            raise ConfigError("nothing to measure", found=f"{name} {value}; allowed: 1 and more", do=f"name a larger {name}")
    config = config.seeded()
    prompts = random_prompts(models[0].config, prompt_tokens, rows, seed=config.seed)
    configs = [replace(config, mode=mode, ignore_eos=True, top_p=1.0) for mode in ("diffusion", "ar")]
    seen: list[dict[str, list[list[Generation]]]] = [{c.mode: [] for c in configs} for _ in models]
    for run in range(runs + 1):
        for options in configs:
            for model, batches in zip(models, seen, strict=True):
                results = model.generate(prompts, options)
                if run:
                    batches[options.mode].append(results)
    return [[_speed(mode, batches) for mode, batches in of_model.items()] for of_model in seen]


def random_prompts(config: ModelConfig, length: int, rows: int, *, seed: int | None) -> list[list[int]]:
    """Prompts of random tokens, special ones left out."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(config.vocab_size), [config.mask_token_id, config.pad_token_id, *config.eos_token_ids])
    return [rng.choice(words, length).tolist() for _ in range(rows)]


def _speed(mode: str, batches: list[list[Generation]]) -> GenerationSpeed:
    def per_batch(figure: Callable[[list[Generation]], float]) -> float:
        return float(median(figure(batch) for batch in batches))

    def longest(figure: Callable[[Generation], float]) -> float:
        return per_batch(lambda batch: max(figure(r) for r in batch))

    if mode == "diffusion":
        pass_ms = longest(lambda r: r.timings.denoise / r.usage.nfe)
        extend_ms = longest(lambda r: r.timings.extend / max(r.usage.blocks - 1, 1))  # nobody reads the last block
    else:
        pass_ms = extend_ms = longest(lambda r: r.timings.extend / r.usage.nfe)
    return GenerationSpeed(
        mode=mode,
        tokens_per_second=per_batch(lambda b: 1000 * sum(len(r.tokens) for r in b) / max(r.timings.total for r in b)),
        prefill_ms=per_batch(lambda b: b[0].timings.prefill),
        pass_ms=pass_ms,
        extend_ms=extend_ms,
        tokens_per_nfe=per_batch(lambda b: sum(r.usage.completion_tokens for r in b) / sum(r.usage.nfe for r in b)),
        steps_per_block=per_batch(lambda b: sum(r.usage.steps_per_block for r in b) / len(b)),
    )
