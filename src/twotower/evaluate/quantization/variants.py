"""Bundles that are never written: any mixture of the weights of a float bundle and of quantized ones, as engines that run.

A mixture is a graph and nothing else. Its weights lie in the files of the bundles it is mixed from, so that quantizing one layer kind at a
time, of a model of any size, costs some hundred kilobytes of disk and the time to measure it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import onnx_ir as ir

from twotower.bundle import GRAPH_FILES, Bundle
from twotower.calibration.ort import composed_engine, engine_places
from twotower.calibration.quantize import precision_of
from twotower.errors import ConfigError
from twotower.export.graph_files import point_to_data
from twotower.export.graphs import Precision, build_graph
from twotower.runtime import TwoTower
from twotower.runtime.engines.tower_engine import TowerEngine
from twotower.runtime.engines.towers import Towers
from twotower.runtime.tokenizer import Tokenizer
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, signatures
from twotower.weights.declared import Weight, lay_out
from twotower.weights.refs import WeightRef

__all__ = ["Mixer"]


class Mixer:
    """Opens mixtures.

    Args:
        reference: A float bundle with a built `ort-cpu` engine.
        quantized: Bundles made from it, with built `ort-cpu` engines; together they must hold every format a mixture asks for.
        scratch: A folder for the graphs.
        threads: Threads of the engines, 0 for as many as the bundle's own would take.
    """

    def __init__(self, reference: Bundle, quantized: Sequence[Bundle], scratch: Path, *, threads: int = 0) -> None:
        self._reference, self._scratch, self._threads = reference, scratch, threads
        self._bundles = (reference, *quantized)
        self._precisions = [precision_of(bundle) for bundle in quantized]
        self._places = [{name: engine_places(bundle, name) for name in GRAPH_FILES} for bundle in self._bundles]
        self._numbers = count()
        # ONNX Runtime reads weights of one folder only, links resolved: the nearest one that holds all bundles.
        paths = [bundle.path.resolve() for bundle in self._bundles]
        self._root = Path(os.path.commonpath(paths))
        self._folders = [path.relative_to(self._root).as_posix() for path in paths]

    def open(self, precision: Precision) -> TwoTower:
        """A session on the mixture in which these weights, and inputs of products, are in few bits and everything else is not.

        Raises:
            ConfigError: a weight is wanted in a format none of the bundles holds it in.
        """
        number = next(self._numbers)
        context, head, denoiser = (self._engine(name, precision, number) for name in (CONTEXT, CONTEXT_HEAD, DENOISER))
        bundle = self._reference
        return TwoTower.from_towers(
            Towers(bundle.config, "float32", context, head, denoiser),
            tokenizer=Tokenizer.from_file(bundle.tokenizer_file) if bundle.tokenizer_file else None,
            trained_block_size=bundle.trained_block_size,
            defaults=bundle.defaults,
        )

    def _engine(self, name: str, precision: Precision, number: int) -> TowerEngine:
        graph = build_graph(name, self._reference.config, self._reference.dtype, precision)
        point_to_data(graph.model, lay_out(graph.weights), "unused")
        located: dict[str, tuple[str, WeightRef]] = {}
        for weight in graph.weights:
            source = self._source(weight)
            if weight.name in self._places[source][name]:  # scales that were expanded with their weight are not
                location, ref = self._places[source][name][weight.name]
                located[weight.name] = (f"{self._folders[source]}/{location}", ref)
        path, signature = self._scratch / f"{number}.{name}.onnx", signatures(self._reference.config, "float32")[name]
        top = self._reference.config.num_experts_per_tok or None
        return composed_engine(
            ir.to_proto(graph.model), located, path, root=self._root, signature=signature, top=top, threads=self._threads
        )

    def _source(self, weight: Weight) -> int:
        """The bundle a weight is taken from."""
        if not weight.origin:
            return 0
        whole = weight.sources[0] if weight.rows is not None else weight.origin
        for i, precision in enumerate(self._precisions, 1):
            held = precision.weights.get(whole)
            if held is not None and weight.format in (None, held):
                return i
        raise ConfigError(
            f"no bundle holds {weight.origin} in the wanted format",
            found=f"{weight.format.label if weight.format else 'rows that stay as they are'}",
            do="report this: it is a defect of twotower",
        )
