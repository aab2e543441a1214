"""The published model and slices of it as configs, and graphs as exports write them."""

from __future__ import annotations

from pathlib import Path

import onnx

from twotower.calibration.recipes import Recipe, builtin_recipes, quantizable_weights
from twotower.checkpoint.synthetic import PUBLISHED_CONFIG, published_slice
from twotower.config.model import ModelConfig, parse_model_config
from twotower.export.graph_files import save_program
from twotower.export.graphs.precision import Precision
from twotower.export.graphs.tower_graphs import build_graph
from twotower.weights.declared import lay_out
from twotower.weights.external import load_graph

PUBLISHED = parse_model_config(PUBLISHED_CONFIG, "published")
RECIPES = {"float": Recipe(name="float"), **builtin_recipes()}


def of_layers(letters: str) -> ModelConfig:
    """The published model with these layers alone."""
    return parse_model_config(published_slice(letters), letters)


def saved_graph(file: Path, config: ModelConfig, graph: str, recipe: str) -> onnx.ModelProto:
    """A graph in bfloat16, written without data and read again."""
    parts = quantizable_weights(config, graph)
    few = {part.name: how for part in parts if (how := RECIPES[recipe].format_of(part))}
    made = build_graph(graph, config, "bfloat16", Precision(few))
    save_program(file, made, lay_out(made.weights))
    return load_graph(file)
