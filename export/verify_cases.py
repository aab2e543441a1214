"""Random inputs for comparing towers: every input distinct, rows of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from twotower.config import ModelConfig
from twotower.spec import (
    BLOCK,
    CHUNK_LENGTH,
    COMMIT_FLOOR,
    CONTEXT_LENGTH,
    NOISE,
    PAST_LENGTH,
    TEMPERATURE,
    THRESHOLD,
    TOKENS,
    candidate_count,
    state_tensors,
)

__all__ = ["Case", "random_case"]

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
_ROWS, _CHUNK, _BLOCK, _CAPACITY = 3, 8, 16, 32


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of all three graphs; `state` holds the context state under its input names, float32."""

    tokens: np.ndarray[Any, np.dtype[np.int64]]
    chunk_length: np.ndarray[Any, np.dtype[np.int64]]
    past_length: np.ndarray[Any, np.dtype[np.int64]]
    context_length: np.ndarray[Any, np.dtype[np.int64]]
    block: np.ndarray[Any, np.dtype[np.int64]]
    sampling: Arrays
    state: Arrays

    def context_inputs(self) -> Arrays:
        return {TOKENS: self.tokens, CHUNK_LENGTH: self.chunk_length, PAST_LENGTH: self.past_length}

    def denoiser_inputs(self) -> Arrays:
        s = self.sampling
        options = {THRESHOLD: s["threshold"], COMMIT_FLOOR: s["floor"], TEMPERATURE: s["temperature"], NOISE: s["noise"]}
        return {BLOCK: self.block, CONTEXT_LENGTH: self.context_length, **options}


def random_case(config: ModelConfig, seed: int) -> Case:
    """Three rows: a full chunk at the start of a text, a padded one, one without tokens; blocks fully, half and not masked."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(config.vocab_size), [config.mask_token_id])
    block = rng.choice(words, (_ROWS, _BLOCK))
    block[0] = config.mask_token_id
    block[1, rng.permutation(_BLOCK)[: _BLOCK // 2]] = config.mask_token_id
    uniform = rng.uniform(1e-6, 1 - 1e-6, (_ROWS, _BLOCK, candidate_count(config)))
    sampling: Arrays = {
        "threshold": rng.uniform(0.0, 0.5, _ROWS).astype(np.float32),
        "floor": np.array([3, 1, 1]),
        "temperature": np.array([0.0, 0.7, 0.0], np.float32),
        "noise": -np.log(-np.log(uniform)).astype(np.float32),
    }
    sizes = {"B": _ROWS, "T": _CAPACITY}
    state = {s.past.name: rng.standard_normal(s.past.shape(sizes)).astype(np.float32) for s in state_tensors(config, "float32")}
    lengths, past = np.array([_CHUNK, 3, 0]), np.array([0, 5, 17])
    return Case(rng.choice(words, (_ROWS, _CHUNK)), lengths, past, past + lengths, block, sampling, state)
