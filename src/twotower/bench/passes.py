"""How long one pass of each tower takes, and how fast that reads the weights."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from twotower.bundle import DATA_SUFFIX, GRAPH_FILES, Bundle
from twotower.config import GenerationConfig
from twotower.runtime import StepRecord, TwoTower
from twotower.spec import CONTEXT, DENOISER

__all__ = ["PassTimes", "measure_passes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Medians of one row after a context of some tokens.

    Attributes:
        context: Tokens before the block.
        runs: Passes of each kind the medians are of.
        denoise_ms: One denoiser pass over a block, from its launch until its tokens are on the host.
        extend_ms: The context tower over one block's tokens and the head, until the next token is on the host.
        denoiser_bytes: Weights of the denoiser as the bundle stores them; likewise
        context_bytes: of the context tower.
    """

    context: int
    runs: int
    denoise_ms: float
    extend_ms: float
    denoiser_bytes: int
    context_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, with bytes over time."""
        rates = {
            "denoise_gb_per_s": self.denoiser_bytes / self.denoise_ms / 1e6,
            "extend_gb_per_s": self.context_bytes / self.extend_ms / 1e6,
        }
        return asdict(self) | rates


def measure_passes(bundle: Bundle, model: TwoTower, *, context: int = 128, runs: int = 30) -> PassTimes:
    """Times passes by wall clock around work that is waited for; every first pass of a kind is not counted.

    Args:
        bundle: What the model was opened from.
        model: The engine.
        context: Tokens of the prompt the denoiser attends to.
        runs: Passes of each kind.
    """
    size = bundle.trained_block_size
    words = np.setdiff1d(np.arange(model.config.vocab_size), [model.config.mask_token_id, *model.config.eos_token_ids])
    rng = np.random.default_rng(0)
    prompt = rng.choice(words, context).tolist()
    # No prediction is surer than 1, so every block takes as many passes as it has positions.
    blocks = -(-runs // size) + 1
    options = GenerationConfig(
        max_new_tokens=blocks * size, block_size=size, confidence_threshold=1.0, steps_per_block=size, ignore_eos=True
    )
    steps: list[StepRecord] = []
    model.generate(prompt, options, on_step=steps.append)
    one = GenerationConfig(mode="ar", max_new_tokens=1, ignore_eos=True)
    chunk = rng.choice(words, size).tolist()
    seconds = []
    for _ in range(runs + 2):
        started = time.perf_counter()
        model.generate(chunk, one)
        seconds.append(time.perf_counter() - started)
    counted = [s.ms for s in steps[size:]]
    return PassTimes(
        context=context,
        runs=min(len(counted), runs),
        denoise_ms=median(counted),
        extend_ms=1000 * median(seconds[2:]),
        denoiser_bytes=bundle.files[GRAPH_FILES[DENOISER] + DATA_SUFFIX].size,
        context_bytes=bundle.files[GRAPH_FILES[CONTEXT] + DATA_SUFFIX].size,
    )
