"""ONNX Runtime engines that also hand out the inputs of their products, for whoever gathers statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from twotower.runtime.engines.base import Binding
from twotower.runtime.engines.ort import OrtEngine
from twotower.runtime.streams import Event, HostStream, Stream
from twotower.spec import TowerSignature

__all__ = ["Watch", "WatchedEngine"]

Array = npt.NDArray[Any]

Watch = Callable[[Mapping[str, Array], Mapping[str, Array]], bool]
"""Called after a pass with the bound arrays and the watched values by name; True runs the pass once more with what the arrays hold now."""


class WatchedEngine(OrtEngine):
    """An engine of the contract with more outputs, which only the watcher sees.

    Args:
        graph: The optimised graph, its watched values among its outputs.
        folder: The folder its weights are named from.
        signature: Inputs and outputs of the contract.
        watched: Names of the further outputs.
        watch: Called after every pass.
    """

    def __init__(self, graph: Path, folder: Path, signature: TowerSignature, *, watched: Sequence[str], watch: Watch) -> None:
        super().__init__(graph, folder, signature, pack=False)
        self._watched, self._watch = tuple(watched), watch

    def bind(self, arrays: Mapping[str, Array]) -> Binding:
        """Binds the contract's inputs and outputs to the buffers; the watched outputs are allocated by each pass."""
        if self._session is None:
            raise RuntimeError("the engine is closed")
        binding = self._session.io_binding()
        for spec in self.signature.inputs:
            a = arrays[spec.name]
            binding.bind_input(spec.name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        for spec in self.signature.outputs:
            a = arrays[spec.name]
            binding.bind_output(spec.name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        for name in self._watched:
            binding.bind_output(name, "cpu")
        return _WatchedBinding(self._session, binding, dict(arrays), self._watched, self._watch)


class _WatchedBinding:
    def __init__(
        self, session: ort.InferenceSession, binding: ort.IOBinding, arrays: dict[str, Array], watched: tuple[str, ...], watch: Watch
    ) -> None:
        self._session, self._binding, self._arrays = session, binding, arrays
        self._watched, self._watch = watched, watch

    def run(self, stream: Stream) -> Event:
        again = True
        while again:
            self._session.run_with_iobinding(self._binding)
            values = self._binding.get_outputs()[-len(self._watched) :] if self._watched else []
            seen = {name: np.asarray(value.numpy()) for name, value in zip(self._watched, values, strict=True)}
            again = self._watch(self._arrays, seen)
        return HostStream.done

    def close(self) -> None:
        """Nothing was made that is not let go with the object."""
