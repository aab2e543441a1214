"""From histograms to the one number a rounded input needs: the magnitude that becomes the greatest value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.calibration.statistics import TowerStatistics, bin_edges
from twotower.calibration.statistics_file import Statistics
from twotower.config.formats import ACTIVATIONS
from twotower.errors import CalibrationError

__all__ = ["activation_scales", "range_of"]

_PERCENTILE = 0.9999


def activation_scales(
    statistics: Statistics, wanted: Mapping[str, str], *, ranges: str, clean_text: bool
) -> dict[str, float]:
    """The range of every wanted input.

    Args:
        statistics: Of this model.
        wanted: Type of the rounded input, by the name of its first weight.
        ranges: `max`, `percentile` or `mse`.
        clean_text: Read the denoiser's ranges from finished blocks only, as tools do that calibrate
            on text.

    Raises:
        CalibrationError: nothing was seen of an input.
    """
    out: dict[str, float] = {}
    for tower, seen in statistics.towers.items():
        chosen = (
            slice(None) if tower == "context" else slice(0, 1) if clean_text else slice(1, None)
        )
        for index, name in enumerate(seen.names):
            if name in wanted and seen.count[index, chosen].any():
                out[name] = range_of(seen, index, chosen, dtype=wanted[name], ranges=ranges)
    missing = [name for name in wanted if name not in out]
    if missing:
        raise CalibrationError(
            f"the statistics say nothing about {len(missing)} inputs",
            found=", ".join(missing[:3]),
            do="calibrate with more prompts, long enough for every expert to be visited",
        )
    return out


def range_of(seen: TowerStatistics, index: int, buckets: Any, *, dtype: str, ranges: str) -> float:
    """The range of one input over some buckets; positive also where only zeros were seen."""
    greatest = float(np.nanmax(seen.greatest[index, buckets]))
    counts = seen.histogram[index, buckets].sum(axis=0)
    if ranges == "percentile":
        greatest = min(greatest, _percentile(counts))
    elif (
        ranges == "mse" and dtype == "int8"
    ):  # a float format rounds relatively: clipping it gains nothing
        greatest = _least_error(counts, greatest, ACTIVATIONS[dtype])
    return max(greatest, 2.0**-20)


def _percentile(counts: npt.NDArray[np.int64]) -> float:
    reached = np.cumsum(counts) >= _PERCENTILE * counts.sum()
    return float(bin_edges()[1 + int(np.argmax(reached))])


def _least_error(counts: npt.NDArray[np.int64], greatest: float, largest: float) -> float:
    """The range at which rounding to `largest` steps on each side costs the smallest sum of squares, of all upper edges of bins.

    Inside the range an error is spread evenly over a step: its mean square is step^2 / 12. Beyond
    it the error is what is cut off.
    """
    edges = bin_edges()
    middles, upper = (edges[:-1] + edges[1:]) / 2, edges[1:]
    middles[0] = 0.0  # zeros, almost always: they are exact at any step
    occupied = np.flatnonzero(counts)
    last = int(occupied[-1])
    candidates = np.unique(np.minimum(upper[max(last - 64, 0) : last + 1], greatest))
    weights, values = counts[occupied].astype(np.float64), np.minimum(middles[occupied], greatest)
    beyond = np.maximum(values[None] - candidates[:, None], 0.0)
    steps = (candidates / largest)[:, None]
    inside = np.where(values[None] > steps / 2, steps**2 / 12, values[None] ** 2) * (beyond == 0)
    costs = ((beyond**2 + inside) * weights).sum(axis=1)
    return float(candidates[int(np.argmin(costs))])
