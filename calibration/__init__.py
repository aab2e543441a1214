"""Fewer bits for a model that denoises: ranges from real denoising runs, recipes, and quantized bundles."""

from twotower.calibration.quantize import QuantizeConfig, plan_quantization, quantize_bundle
from twotower.calibration.recipes import Recipe, builtin_recipes, load_recipe

__all__ = [
    "QuantizeConfig",
    "Recipe",
    "builtin_recipes",
    "load_recipe",
    "plan_quantization",
    "quantize_bundle",
]
