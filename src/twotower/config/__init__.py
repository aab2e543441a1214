"""Frozen configurations: what the model is, and how to generate with it."""

from twotower.config.generation import GenerationConfig
from twotower.config.model import LayerKind, ModelConfig, read_model_config

__all__ = ["GenerationConfig", "LayerKind", "ModelConfig", "read_model_config"]
