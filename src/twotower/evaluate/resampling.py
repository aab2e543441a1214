"""Ratios of sums over problems, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]


Interval = dict[str, float | None]
"""`value`, an estimate, and `low` and `high`, the ends of its 95 % interval: all None where it is
not defined."""


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
            return {"value": None, "low": None, "high": None}
        low, high = np.percentile(usable, (2.5, 97.5)).tolist()
        return {
            "value": round(value, 5),
            "low": round(low, 5),
            "high": round(high, 5),
        }


def interval_text(data: Interval, digits: int = 1, unit: str = "") -> str:
    """`98.9 [97.8, 99.7]`, or a dash where there is nothing to say."""
    if data["value"] is None:
        return "-"
    value, low, high = (f"{data[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"
