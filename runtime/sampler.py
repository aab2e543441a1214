"""Choices as pure functions of logits and a counter: the same seed gives the same text on any backend and batch size."""

from __future__ import annotations

from typing import Any

import numpy as np

from twotower.config import GenerationConfig

__all__ = ["block_noise", "choose_token", "gumbel"]

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


def gumbel(seed: int, block: int, step: int, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Standard Gumbel noise that depends on (seed, block, step) alone.

    Philox is a counter-based generator; its raw words are turned into uniforms here because numpy promises to keep the words, not the
    distributions, the same in later versions. The row's place in the batch is not part of the key: a row's own seed is.
    """
    words = np.random.Philox(key=seed, counter=np.array([0, 0, step, block], dtype=np.uint64)).random_raw(int(np.prod(shape)))
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform)).reshape(shape)


def block_noise(config: GenerationConfig, block: int, step: int, out: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Fills `out` [S,K] for one row and denoising step: zeros when greedy, -inf for candidates beyond top-k."""
    if config.temperature == 0:
        out.fill(0.0)
        return
    out[:] = gumbel(config.seed, block, step, out.shape)
    if config.top_k:
        out[:, config.top_k :] = -np.inf


def choose_token(ids: Ids, logprobs: Floats, config: GenerationConfig, index: int) -> int:
    """The next token of an autoregressive text.

    Args:
        ids: [K] candidates, best first.
        logprobs: [K] their log-probabilities.
        config: Temperature first, then top-k, then top-p over what is left, as is customary. Tokens beyond the K candidates are never
            sampled.
        index: How many tokens were generated before: the counter of the noise.
    """
    if config.temperature == 0:
        return int(ids[0])
    scores = logprobs.astype(np.float64) / config.temperature
    if config.top_k:
        scores[config.top_k :] = -np.inf
    if config.top_p < 1:
        p = np.exp(scores - scores.max())
        before = np.concatenate(([0.0], np.cumsum(p / p.sum())[:-1]))
        scores[before >= config.top_p] = -np.inf
    return int(ids[np.argmax(scores + gumbel(config.seed, index, 0, scores.shape))])
