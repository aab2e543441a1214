"""Quantization: activation ranges from real denoising, recipes, and quantized bundles."""

from twotower.calibration.quantization_plan import QuantizeConfig, plan_quantization
from twotower.calibration.quantize import quantize_bundle
from twotower.calibration.recipes import Recipe, builtin_recipes, load_recipe

__all__ = [
    "QuantizeConfig",
    "Recipe",
    "builtin_recipes",
    "load_recipe",
    "plan_quantization",
    "quantize_bundle",
]
