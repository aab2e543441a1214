"""How tokens are chosen: the choice of an AR token, and the noise of both modes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from twotower.config import GenerationConfig

DIFFUSION, AR = 0, 1
"""The last number of a counter: the two modes must not share noise."""

_TOGETHER = 8192
"""Numbers transformed in one go: 64 KiB of float64 stay in a core's cache between two steps."""

_SEED_BITS = 53  # of a drawn one: JSON readers that keep numbers as doubles keep it exactly
# float32 logits divided by it stay finite, so that noise of -inf cannot make a NaN of them
_SMALLEST_TEMPERATURE = 1e-30


def keyed_uniforms(seed: int, counter: tuple[int, int, int], count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in (0, 1), the same on every machine, NumPy version and batch.

    Philox is a counter-based generator: numbers of different counters never overlap. Only its raw
    bits are used, since how NumPy makes floats of them may change from version to version.
    """
    key, start = np.array([seed, 0], np.uint64), np.array([0, *counter], np.uint64)
    raw = np.random.Philox(key=key, counter=start).random_raw(count)
    return ((np.asarray(raw, np.uint64) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel_noise(seed: int, counter: tuple[int, int, int], count: int) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise: added to log-probabilities, it makes the highest a sample of them."""
    return -np.log(-np.log(keyed_uniforms(seed, counter, count)))


class StepNoise:
    """The denoiser's noise for a batch, step by step.

    A row's numbers are those of `gumbel_noise` under its own seed, to the bit, whatever rows are
    beside it. They depend on nothing that a pass computes, so those of the next step can be drawn
    while an engine works on this one.

    One generator is set to each row's key in turn. Philox in array arithmetic over all keys, its
    64-bit products made of halves, was measured at seven times the time of that.

    Args:
        seeds: Of each row; None for a greedy row, whose noise is 0.
        top_k: Of each row: candidates from this rank on get -inf, which excludes them; 0 for all.
        size: S positions and K candidates.
    """

    def __init__(
        self, seeds: Sequence[int | None], top_k: Sequence[int], *, size: tuple[int, int]
    ) -> None:
        self._seeds = [seed or 0 for seed in seeds]
        self._sampled = [seed is not None for seed in seeds]
        self._top_k, self._size = tuple(top_k), size
        count = size[0] * size[1]
        self._group = max(min(_TOGETHER // count, sum(self._sampled)), 1)
        self._noise = np.zeros((len(self._seeds), *size), np.float32)
        self._bits = np.empty((self._group, count), np.uint64)
        self._values = np.empty((self._group, count))
        self._philox = np.random.Philox(0)
        self._key, self._counter = [0, 0], [0, 0, 0, 0]
        self._start: Any = {  # set for every row: a tenth of the time that a new generator takes
            "bit_generator": "Philox",
            "state": {"key": self._key, "counter": self._counter},
            "buffer": [0, 0, 0, 0],
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._drawn: tuple[int, int] | None = None

    def draw(self, live: Sequence[int], *, block: int, step: int) -> None:
        """Draws the noise of a block's step for the rows that are `live`: may have masks then."""
        rows = [i for i, sampled in enumerate(self._sampled) if sampled and live[i]]
        for first in range(0, len(rows), self._group):
            self._draw(rows[first : first + self._group], (step, block, DIFFUSION))
        self._drawn = (block, step)

    def write(
        self, out: npt.NDArray[np.float32], live: Sequence[int], *, block: int, step: int
    ) -> None:
        """Fills `out`, [B,S,K] float32, with the noise of a step; see `draw`.

        It is drawn now if it was not before. What rows that are not live get has no meaning.
        """
        if any(self._sampled) and self._drawn != (block, step):
            self.draw(live, block=block, step=step)
        np.copyto(out, self._noise)

    def _draw(self, rows: Sequence[int], counter: tuple[int, int, int]) -> None:
        """The arithmetic of `gumbel_noise`, operation by operation, on rows side by side."""
        bits, values = self._bits[: len(rows)], self._values[: len(rows)]
        self._counter[1:] = counter
        for row, into in zip(rows, bits, strict=True):
            self._key[0] = self._seeds[row]
            self._philox.state = self._start
            into[:] = self._philox.random_raw(into.size)
        np.right_shift(bits, np.uint64(11), out=bits)
        np.copyto(values, bits)
        values += 0.5
        values *= 2.0**-53
        np.log(values, out=values)
        np.negative(values, out=values)
        np.log(values, out=values)
        np.negative(values, out=values)
        self._noise[rows] = values.reshape(-1, *self._size)
        for row in rows:
            if self._top_k[row]:
                self._noise[row, :, self._top_k[row] :] = -np.inf


class Choice(Protocol):
    """How one row's tokens are chosen; `Sampling` follows a request's options."""

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
        temperature, seed = 0.0, config.seed
        if config.temperature > 0:
            temperature = max(config.temperature, _SMALLEST_TEMPERATURE)
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
        # a very small temperature sends all but the best to -inf, which is what it means
        with np.errstate(over="ignore"):
            scaled = (kept - kept[0]) / self.temperature
        if self.top_p < 1:
            weights = np.exp(scaled)
            before = np.cumsum(weights) - weights
            scaled = scaled[: max(int(np.count_nonzero(before < self.top_p * weights.sum())), 1)]
        noise = gumbel_noise(self.seed, (0, index, AR), len(ids))
        return int(ids[int(np.argmax(scaled + noise[: len(scaled)]))])
