"""Frozen configurations: what the model is, and how to generate with it."""

from twotower.config.generation import MODES, GenerationConfig
from twotower.config.model import LayerKind, ModelConfig, read_model_config

__all__ = ["MODES", "GenerationConfig", "LayerKind", "ModelConfig", "read_model_config"]
