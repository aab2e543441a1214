"""The three ONNX graphs of the contract, written operator by operator from the model config."""

from twotower.export.graphs.builder import OPSET
from twotower.export.graphs.precision import ActivationFormat, Precision, Tap
from twotower.export.graphs.towers import TowerGraph, build_graph

__all__ = ["OPSET", "ActivationFormat", "Precision", "Tap", "TowerGraph", "build_graph"]
