"""How tokens are chosen, as small values: a row's options, and the choice of an AR token."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig
from twotower.runtime.noise import AR, gumbel_noise

__all__ = ["Choice", "Sampling"]

_SEED_BITS = 53  # of a drawn one: JSON readers that keep numbers as doubles keep it exactly
# float32 logits divided by it stay finite, so that noise of -inf cannot make a NaN of them
_SMALLEST_TEMPERATURE = 1e-30


class Choice(Protocol):
    """How one row's tokens are chosen; `Sampling` is what a request's options make of it."""

    @property
    def greedy(self) -> bool: ...

    @property
    def temperature(self) -> float: ...

    def choose(
        self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[Any], *, index: int
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row chooses its tokens.

    The noise is keyed by the row's own seed and not by its place in the batch: its text is the same
    alone, among others, and in any order.
    """

    seed: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def from_config(cls, config: GenerationConfig) -> Sampling:
        """The sampling part of a request's options; a seed that is needed and missing is drawn."""
        temperature = (
            max(config.temperature, _SMALLEST_TEMPERATURE) if config.temperature > 0 else 0.0
        )
        seed = config.seed
        if seed is None:
            seed = secrets.randbits(_SEED_BITS) if temperature else 0
        return cls(seed, temperature, config.top_k, config.top_p)

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0

    def choose(self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[Any], *, index: int) -> int:
        """The next token of an autoregressive row, from its best candidates in descending order.

        Temperature, top-k and top-p apply in this order, as elsewhere; probabilities are taken
        among the K candidates.

        Args:
            ids: [K] int64.
            logprobs: [K], un-tempered.
            index: Number of the token in the row's generated text.
        """
        if self.greedy:
            return int(ids[0])
        kept = logprobs[: self.top_k or len(ids)].astype(np.float64)
        with np.errstate(
            over="ignore"
        ):  # a very small temperature sends all but the best to -inf, which is what it means
            scaled = (kept - kept[0]) / self.temperature
        if self.top_p < 1:
            weights = np.exp(scaled)
            before = np.cumsum(weights) - weights
            scaled = scaled[: max(int(np.count_nonzero(before < self.top_p * weights.sum())), 1)]
        noise = gumbel_noise(self.seed, (0, index, AR), len(ids))
        return int(ids[int(np.argmax(scaled + noise[: len(scaled)]))])
