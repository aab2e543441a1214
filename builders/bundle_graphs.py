"""The graphs of a bundle during a build: each is read from the disk once."""

from __future__ import annotations

import onnx

from twotower.bundle import Bundle
from twotower.weights.external import load_graph

__all__ = ["BundleGraphs"]


class BundleGraphs:
    """Graphs without their weights, some megabytes each.

    Args:
        bundle: Where they lie.

    Attributes:
        bundle: The same.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._read: dict[str, onnx.ModelProto] = {}

    def shared(self, name: str) -> onnx.ModelProto:
        """A graph as it was exported, the same one every time: to be read and not to be changed."""
        if name not in self._read:
            self._read[name] = load_graph(self.bundle.graph_file(name))
        return self._read[name]

    def copied(self, name: str) -> onnx.ModelProto:
        """A graph of the caller's own."""
        model = onnx.ModelProto()
        model.CopyFrom(self.shared(name))
        return model
