"""Weights of a bundle on devices: read once, shared by every engine of a tower."""

from twotower.runtime.weights.requests import Loaded, LoadOptions, LoadRequest
from twotower.runtime.weights.store import WeightStore
from twotower.runtime.weights.transfer import Ring

__all__ = ["LoadOptions", "LoadRequest", "Loaded", "Ring", "WeightStore"]
