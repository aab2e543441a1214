"""How tokens are chosen, as small values: keyed noise for the denoiser, and the choice among an AR step's candidates."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig

__all__ = ["Choice", "Sampling", "gumbel_noise", "keyed_uniforms"]

_DIFFUSION, _AR = 0, 1  # the two modes must not share noise
_SEED_BITS = 53  # of a drawn one: JSON readers that keep numbers as doubles keep it exactly
_SMALLEST_TEMPERATURE = 1e-30  # float32 logits divided by it stay finite, so that noise of -inf cannot make a NaN of them


def keyed_uniforms(seed: int, counter: tuple[int, int, int], count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in (0, 1), the same for the same key on every machine, NumPy version and batch.

    Philox is a counter-based generator: there is no state to carry, and numbers of different counters never overlap. Only its raw
    bits are used; how NumPy makes floats of them may change from version to version.

    Args:
        seed: 0 to 2**64 - 1.
        counter: Three whole numbers that name the place of use.
        count: How many.
    """
    raw = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, *counter], np.uint64)).random_raw(count)
    return ((np.asarray(raw, np.uint64) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel_noise(seed: int, counter: tuple[int, int, int], count: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise: adding it to log-probabilities and taking the highest draws from the distribution."""
    return -np.log(-np.log(keyed_uniforms(seed, counter, count)))


class Choice(Protocol):
    """How one row's tokens are chosen; `Sampling` is what a request's options make of it."""

    @property
    def greedy(self) -> bool: ...

    @property
    def temperature(self) -> float: ...

    def write_noise(self, out: npt.NDArray[np.float32], *, block: int, step: int) -> None: ...

    def choose(self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[Any], *, index: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one row chooses its tokens.

    The noise is keyed by the row's own seed and not by its place in the batch: its text is the same alone, among others, and in any order.
    """

    seed: int
    temperature: float
    top_k: int
    top_p: float

    @classmethod
    def from_config(cls, config: GenerationConfig) -> Sampling:
        """The sampling part of a request's options; a seed that is needed and missing is drawn."""
        temperature = max(config.temperature, _SMALLEST_TEMPERATURE) if config.temperature > 0 else 0.0
        seed = config.seed
        if seed is None:
            seed = secrets.randbits(_SEED_BITS) if temperature else 0
        return cls(seed, temperature, config.top_k, config.top_p)

    @property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0

    def write_noise(self, out: npt.NDArray[np.float32], *, block: int, step: int) -> None:
        """Fills the denoiser's noise for one row and one step.

        Args:
            out: [S,K] float32, candidates in descending order. Those from rank `top_k` on get -inf, which excludes them; all is 0 at
                temperature 0.
            block: Number of the block in the row's text.
            step: Number of the step in the block.
        """
        if self.greedy:
            out[:] = 0
            return
        out[:] = gumbel_noise(self.seed, (step, block, _DIFFUSION), out.size).reshape(out.shape)
        if self.top_k:
            out[:, self.top_k :] = -np.inf

    def choose(self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[Any], *, index: int) -> int:
        """The next token of an autoregressive row, from its best candidates in descending order.

        Temperature, top-k and top-p apply in this order, as elsewhere; probabilities are taken among the K candidates.

        Args:
            ids: [K] int64.
            logprobs: [K], un-tempered.
            index: Number of the token in the row's generated text.
        """
        if self.greedy:
            return int(ids[0])
        kept = logprobs[: self.top_k or len(ids)].astype(np.float64)
        with np.errstate(over="ignore"):  # a very small temperature sends all but the best to -inf, which is what it means
            scaled = (kept - kept[0]) / self.temperature
        if self.top_p < 1:
            weights = np.exp(scaled)
            before = np.cumsum(weights) - weights
            scaled = scaled[: max(int(np.count_nonzero(before < self.top_p * weights.sum())), 1)]
        noise = gumbel_noise(self.seed, (0, index, _AR), len(ids))
        return int(ids[int(np.argmax(scaled + noise[: len(scaled)]))])
