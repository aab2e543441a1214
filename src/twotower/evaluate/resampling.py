"""Ratios of sums over problems, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Plain data; None for NaN, which JSON has no word for."""
        pairs = {"value": self.value, "low": self.low, "high": self.high}
        return {k: None if np.isnan(v) else round(v, 5) for k, v in pairs.items()}


class Resampler:
    """Paired percentile bootstrap: a draw takes problems with replacement, all figures of each.

    `seed` names the draws: the same data give the same interval.
    """

    def __init__(self, count: int, *, draws: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._weights = rng.multinomial(
            count,
            np.full(count, 1 / count),
            size=draws,
        ).astype(np.float64)

    def interval(self, statistic: Callable[..., Values], *columns: Values) -> Interval:
        """The statistic of the columns' sums and its interval; it must work on arrays of sums."""
        with np.errstate(divide="ignore", invalid="ignore"):
            values = statistic(*(self._weights @ c.astype(np.float64) for c in columns))
            value = float(statistic(*(np.asarray(c.sum(), np.float64) for c in columns)))
        usable = values[np.isfinite(values)]
        if not np.isfinite(value) or not len(usable):
            return Interval(float("nan"), float("nan"), float("nan"))
        low, high = np.percentile(usable, (2.5, 97.5))
        return Interval(value, float(low), float(high))
