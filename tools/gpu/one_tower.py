"""One tower of a bundle, its weights random numbers, for passes as the runtime makes them.

The published model's two towers do not fit into 80 GB together, and 118 GB do not travel.
What a pass costs depends on neither: numbers are drawn where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import cast

import numpy as np

from twotower.bundle import Bundle, engine_folder, load_engine_record
from twotower.flavour import Flavour
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.memory import DeviceMemory
from twotower.runtime.cuda.streams import CudaStream
from twotower.runtime.engines.tensorrt_engine import EngineRoom, TensorRTEngine
from twotower.runtime.engines.tensorrt_plan import PlanLoader
from twotower.runtime.engines.towers import Towers
from twotower.runtime.memory import numpy_dtype
from twotower.runtime.streams import Streams
from twotower.runtime.weights import WeightStore
from twotower.spec import CONTEXT, CONTEXT_HEAD, DENOISER, TensorSpec, signatures, state_tensors

__all__ = ["OneTower", "RandomWeights"]

_ALIGNED = 256
_SCALE = 0.02
_PERIOD = 64 << 20
"""Bytes that are drawn and then repeated: more than any cache of a GPU."""


class RandomWeights:
    """Weights in one block of device memory, small random numbers, in the place of a `WeightStore`.

    Bits are drawn as bfloat16. Two of them are a float32 whose upper half is the second, so weights
    of either type are numbers of the same size.

    Args:
        cuda: The calls; device 0 is current.
        specs: The weights.

    Attributes:
        nbytes: Bytes of all of them.

    Raises:
        MemoryError: there is not so much.
    """

    def __init__(self, cuda: Cuda, specs: Sequence[TensorSpec]) -> None:
        self._cuda = cuda
        self._offsets: dict[str, int] = {}
        end = self.nbytes = 0
        for spec in specs:
            size = prod(map(int, spec.axes)) * numpy_dtype(spec.dtype).itemsize
            self._offsets[spec.name] = end
            self.nbytes += size
            end += -(-size // _ALIGNED) * _ALIGNED
        self._base = cuda.allocate(max(end, _ALIGNED))
        self._fill(end)

    def address(self, file: Path, name: str, device: int) -> int:
        """Where a weight lies."""
        return self._base + self._offsets[name]

    def close(self) -> None:
        """Frees them; idempotent."""
        base, self._base = self._base, 0
        if base:
            self._cuda.free(base)

    def _fill(self, size: int) -> None:
        first = min(size, _PERIOD)
        drawn = np.random.default_rng(0).standard_normal(first // 2, np.float32) * _SCALE
        host, stream = self._cuda.allocate_pinned(max(first, _ALIGNED)), self._cuda.create_stream()
        pinned = np.frombuffer(self._cuda.bytes_at(host, first), np.uint16)
        pinned[:] = drawn.view(np.uint32) >> 16
        self._cuda.copy(self._base, host, first, stream=stream)
        done = first
        while done < size:  # what is there is doubled; the period stays where it was
            more = min(done, size - done)
            self._cuda.copy(self._base + done, self._base, more, stream=stream)
            done += more
        self._cuda.synchronize(stream)
        self._cuda.destroy_stream(stream)
        self._cuda.free_pinned(host)


class OneTower:
    """The engine of one graph, loaded, with random weights.

    Args:
        bundle: Of graphs alone, or any other, with engines for the library.
        graph: Which graph; it must be in one piece.
        flavour: The library.
        cuda: The calls.

    Attributes:
        weights: Its weights.

    Raises:
        EngineMismatchError: the library does not load the engine.
        MemoryError: there is no room for the weights.
    """

    def __init__(self, bundle: Bundle, graph: str, flavour: Flavour, cuda: Cuda) -> None:
        self._bundle, self._graph, self._cuda = bundle, graph, cuda
        cuda.use(0)
        self._record = load_engine_record(bundle, flavour.target)
        state = state_tensors(bundle.config, self._record.dtype)
        self._loader = PlanLoader(
            flavour, {t.present.name: t.past.name for t in state if t.in_place}
        )
        (part,) = self._record.engines[graph]
        self._plan = self._loader.load(engine_folder(bundle, flavour.target) / part.file, part, 0)
        self.weights = RandomWeights(cuda, part.weights)

    def towers(self, *, graphs: bool) -> Towers:
        """The bundle's towers, of which this one alone can be bound; closing them keeps the engine.

        Args:
            graphs: Whether passes are captured.
        """
        bundle, cuda, limits = self._bundle, self._cuda, self._record.limits
        assert limits is not None, "TensorRT engines have limits"
        with Cleanup() as undo:
            memory = DeviceMemory(cuda, (0,), {})
            undo.callback(memory.close)
            queues = [CudaStream(cuda, (0,)) for _ in range(2)]
            undo.callback(Streams(*queues).close)
            weights = cast(WeightStore, self.weights)
            room = EngineRoom(cuda, self._loader, memory, weights, graphs)
            room.scratch[0] = (memory.scratch(self._plan.scratch, 0), self._plan.scratch)
            engines = {
                name: TensorRTEngine(
                    signature.with_sizes({"T": limits.capacity, "S": bundle.trained_block_size}),
                    [self._plan] if name == self._graph else [],
                    room,
                    data=bundle.data_file(name),
                )
                for name, signature in signatures(bundle.config, self._record.dtype).items()
            }
            undo.pop_all()
        return Towers(
            bundle.config,
            self._record.dtype,
            engines[CONTEXT],
            engines[CONTEXT_HEAD],
            engines[DENOISER],
            memory=memory,
            streams=Streams(*queues),
            limits=limits,
            fixed_block=bundle.trained_block_size,
        )

    def close(self) -> None:
        """Frees the weights, then the engine."""
        self.weights.close()
        del self._plan
