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
from twotower.dtypes import carried_dtype
from twotower.runtime.cleanup import Cleanup
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.cuda.device_memory import DeviceMemory
from twotower.runtime.cuda.device_streams import CudaStream
from twotower.runtime.device import Streams
from twotower.runtime.engines.kernel_experts import KernelExperts
from twotower.runtime.engines.shared_resources import SharedResources, code_places
from twotower.runtime.engines.towers import Towers
from twotower.runtime.engines.trt_engine import PassOptions, TensorRTEngine, load_steps
from twotower.runtime.engines.trt_plan import Plan, PlanLoader
from twotower.runtime.weights.store import WeightStore
from twotower.spec import (
    CONTEXT,
    CONTEXT_HEAD,
    DENOISER,
    MAX_CHUNK,
    TensorSpec,
    signatures,
    state_tensors,
)
from twotower.tensorrt_library import Variant

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
            size = prod(map(int, spec.axes)) * carried_dtype(spec.dtype).itemsize
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
    """The engine of one graph, or its programs and the experts between them, with random weights.

    Args:
        bundle: Of graphs alone, or any other, with engines for the library.
        graph: Which graph.
        variant: The library.
        cuda: The calls.

    Attributes:
        weights: Its weights, those that kernels of experts read included.
        computed_by: What computes its experts, as the build says.

    Raises:
        EngineMismatchError: the library or the driver does not load it.
        MemoryError: there is no room for the weights.
    """

    def __init__(self, bundle: Bundle, graph: str, variant: Variant, cuda: Cuda) -> None:
        self._bundle, self._graph, self._cuda = bundle, graph, cuda
        cuda.use(0)
        self._record = load_engine_record(bundle, variant.target)
        state = state_tensors(bundle.config, self._record.dtype)
        in_place = {t.present.name: t.past.name for t in state if t.in_place}
        self._loader = PlanLoader(variant, cuda, in_place)
        choice = self._record.report.get("choice_of_experts", {})
        self.computed_by = str(choice.get("computed_by", "dense"))
        folder, parts = engine_folder(bundle, variant.target), self._record.engines[graph]
        devices = [0] * len(parts)
        code = code_places(self._record.steps[graph], devices)
        self._steps = load_steps(bundle, self._record, graph, devices=devices, loader=self._loader)
        self._experts = KernelExperts(folder, cuda, code) if code else None
        specs = [spec for part in parts for spec in part.weights]
        specs += [w for step in self._record.experts[graph] for w in step.weights.values()]
        self.weights = RandomWeights(cuda, list({spec.name: spec for spec in specs}.values()))

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
            shared = SharedResources(cuda, memory, weights, self._experts)
            sizes = {"B": limits.max_batch, "L": MAX_CHUNK}
            scratch = {0: max(step.scratch for step in self._steps if isinstance(step, Plan))}
            steps = [self._record.steps[self._graph]]
            shared.allocate(steps, scratch=scratch, sizes=sizes)
            engines = {
                name: TensorRTEngine(
                    signature.with_sizes({"T": limits.capacity, "S": bundle.trained_block_size}),
                    self._steps if name == self._graph else [],
                    shared,
                    PassOptions(self._loader, graphs=graphs),
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
        """Frees the weights, then kernels and engines."""
        self.weights.close()
        if self._experts is not None:
            self._experts.close()
        del self._steps
