"""ONNX Runtime engines beside a bundle's own: composed of weights of other files, or watched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from twotower.builders.ort.cpu import engine_places, experts_are_packed, write_engine
from twotower.bundle import GRAPH_FILES
from twotower.onnx_runtime import ort
from twotower.processors import usable_memory
from twotower.runtime.device import Event, HostStream, Stream
from twotower.runtime.engines.ort import OrtEngine, engine_threads
from twotower.runtime.engines.tower_engine import Binding
from twotower.spec import TowerSignature
from twotower.weights.refs import WeightRef

__all__ = [
    "Seen",
    "Watch",
    "WatchedEngine",
    "composed_engine",
    "engine_places",
    "plain_engine",
    "write_engine",
]

Array = npt.NDArray[Any]

Seen = Callable[[Mapping[str, Array], Mapping[str, Array]], bool]
"""Called after a pass with the bound arrays and the watched values by name; True runs the pass once
more with what the arrays hold now."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Names of further outputs of an engine, and who is called with them after every pass."""

    outputs: tuple[str, ...]
    seen: Seen


def composed_engine(
    model: onnx.ModelProto,
    located: Mapping[str, tuple[str, WeightRef]],
    path: Path,
    *,
    root: Path,
    signature: TowerSignature,
    top: int | None = None,
    threads: int = 0,
) -> OrtEngine:
    """An engine of a recorded graph on weights that lie in other files.

    Args:
        model: The graph; changed.
        located: For each weight its file, relative to `root`, and its place there.
        path: Where the optimised graph is written.
        root: The folder weights are named from.
        signature: Inputs and outputs.
        top: Experts a token chooses, to compute only those; None to compute all.
        threads: 0 for as many as a bundle's own engine would take.
    """
    size = sum(ref.nbytes for _, ref in located.values())
    packed = experts_are_packed(len(GRAPH_FILES) * size, usable_memory())
    write_engine(model, located, path, name=signature.name, top=top, packed=packed)
    return OrtEngine(path, root, signature, pack=True, threads=threads or engine_threads(size))


def plain_engine(graph: Path, folder: Path, signature: TowerSignature) -> OrtEngine:
    """A bundle's own engine, its weights where they are."""
    return OrtEngine(graph, folder, signature, pack=False)


class WatchedEngine(OrtEngine):
    """An engine of the contract with more outputs, which only the watcher sees.

    The watched values are outputs of the optimised `graph`; weights are named from `folder`.
    """

    def __init__(
        self,
        graph: Path,
        folder: Path,
        signature: TowerSignature,
        watch: Watch,
    ) -> None:
        super().__init__(graph, folder, signature, pack=False)
        self._watch = watch

    def bind(self, arrays: Mapping[str, Array]) -> Binding:
        """Binds the contract's inputs and outputs; each pass allocates the watched ones."""
        session, binding = self._bound(arrays)
        for name in self._watch.outputs:
            binding.bind_output(name, "cpu")
        return _WatchedBinding(session, binding, arrays, self._watch)


class _WatchedBinding:
    def __init__(
        self,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        arrays: Mapping[str, Array],
        watch: Watch,
    ) -> None:
        self._session, self._binding = session, binding
        self._arrays, self._watch = arrays, watch

    def run(self, stream: Stream) -> Event:
        names, again = self._watch.outputs, True
        while again:
            self._session.run_with_iobinding(self._binding)
            values = self._binding.get_outputs()[-len(names) :] if names else []
            arrays = [np.asarray(value.numpy()) for value in values]
            again = self._watch.seen(self._arrays, dict(zip(names, arrays, strict=True)))
        return HostStream.done

    def close(self) -> None:
        """Nothing was made that is not let go with the object."""
