"""From histograms to the one number a quantized input needs: its range."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from twotower.calibration.activation_statistics import Statistics, bin_edges
from twotower.config.formats import ACTIVATIONS
from twotower.errors import CalibrationError

_PERCENTILE = 0.9999
_LEAST_RANGE = 2.0**-20


def activation_ranges(
    statistics: Statistics, wanted: Mapping[str, str], *, ranges: str, clean_text: bool
) -> dict[str, float]:
    """The range of every wanted input: the magnitude that becomes the greatest quantized value.

    Args:
        statistics: Of this model.
        wanted: Type of the quantized input, by the name of its first weight.
        ranges: `max`, `percentile` or `mse`.
        clean_text: Read the denoiser's ranges from finished blocks only, as tools that calibrate on
            text do.

    Raises:
        CalibrationError: nothing was seen of an input.
    """
    out: dict[str, float] = {}
    for tower, seen in statistics.towers.items():
        buckets = slice(None)
        if tower != "context":
            buckets = slice(0, 1) if clean_text else slice(1, None)
        for index, name in enumerate(seen.names):
            if name in wanted and seen.count[index, buckets].any():
                counts = seen.histogram[index, buckets].sum(axis=0)
                amax = float(np.nanmax(seen.amax[index, buckets]))
                out[name] = activation_range(counts, amax, dtype=wanted[name], ranges=ranges)
    missing = [name for name in wanted if name not in out]
    if missing:
        raise CalibrationError(
            f"the statistics say nothing about {len(missing)} inputs",
            found=", ".join(missing[:3]),
            do="calibrate with more prompts, long enough for every expert to be visited",
        )
    return out


def activation_range(
    counts: npt.NDArray[np.int64], amax: float, *, dtype: str, ranges: str
) -> float:
    """The range of one input from its histogram [BINS]; positive even if only zeros were seen."""
    if ranges == "percentile":
        reached = np.cumsum(counts) >= _PERCENTILE * counts.sum()
        amax = min(amax, float(bin_edges()[1 + int(np.argmax(reached))]))
    elif ranges == "mse" and dtype == "int8":  # clipping a float format gains nothing
        amax = _least_error(counts, amax, ACTIVATIONS[dtype])
    return max(amax, _LEAST_RANGE)


def _least_error(counts: npt.NDArray[np.int64], amax: float, largest: float) -> float:
    """The range, of all upper edges of bins, with the least sum of squared quantization errors.

    There are `largest` steps on each side. Inside the range the mean square error is step^2 / 12;
    beyond it the error is what is cut off.
    """
    edges = bin_edges()
    middles, upper = (edges[:-1] + edges[1:]) / 2, edges[1:]
    middles[0] = 0.0  # zeros, almost always: they are exact at any step
    occupied = np.flatnonzero(counts)
    last = int(occupied[-1])
    candidates = np.unique(np.minimum(upper[max(last - 64, 0) : last + 1], amax))
    weights = counts[occupied].astype(np.float64)
    values = np.minimum(middles[occupied], amax)
    beyond = np.maximum(values[None] - candidates[:, None], 0.0)
    steps = (candidates / largest)[:, None]
    spread = np.where(
        values[None] > steps / 2,
        steps**2 / 12,
        values[None] ** 2,
    )
    costs = ((beyond**2 + spread * (beyond == 0)) * weights).sum(axis=1)
    return float(candidates[int(np.argmin(costs))])
