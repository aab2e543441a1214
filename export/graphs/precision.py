"""What of a graph is quantized, and where the activation ranges that decide it are watched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from twotower.config.formats import WeightFormat


@dataclass(frozen=True, slots=True)
class ActivationFormat:
    """A quantized input of a product: one unit of `int8` or `float8e4m3fn` stands for `scale`."""

    dtype: str
    scale: float


@dataclass(frozen=True, slots=True)
class Precision:
    """Quantized parts of a graph; what is not named stays as it is.

    `weights` has formats by names in a float graph, `activations` by the first weight that an input
    is multiplied with.
    """

    weights: Mapping[str, WeightFormat] = field(default_factory=dict)
    activations: Mapping[str, ActivationFormat] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tap:
    """The input of a product, as a place to watch; `weight` is the (first) it is multiplied with.

    `visited` names the [E,N,1] value above 0 where a row is used; None where every row is.
    """

    weight: str
    value: str
    visited: str | None
