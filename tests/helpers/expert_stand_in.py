"""Experts over the CUDA stand-in: NumPy in the place of the kernels, on memory by address, as late as the stream has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.helpers.cuda_stand_in import CudaStandIn
from tests.helpers.stand_in_graph import view
from twotower.bundle import ExpertsStep
from twotower.config.weights import WeightRef
from twotower.graph_files import read_weight
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.experts import ExpertPlaces

__all__ = ["ExpertStandIn", "experts_by_hand"]

_NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def experts_by_hand(step: ExpertsStep, x: np.ndarray, shares: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the experts of a layer give, token by token, so that none depends on its neighbours.

    Args:
        step: Sizes and types.
        x: [N,D].
        shares: [experts,N] float32.
        weights: By role, as `read_weight` gives them.
    """
    dtype = _NUMPY[step.dtype]

    def rounded(value: np.ndarray) -> np.ndarray:
        return value.astype(dtype).astype(np.float32)

    def product(matrix: np.ndarray, row: np.ndarray) -> np.ndarray:
        return rounded(matrix @ row)

    full = {matrix: _wide(step, matrix, weights) for matrix in ("up", "down", "shared_up", "shared_down") if matrix in weights}
    out = np.zeros(x.shape, dtype)
    for n, row in enumerate(x.astype(np.float32)):
        total = np.zeros(step.hidden, np.float32)
        for e in np.flatnonzero(shares[:, n]):
            hidden = rounded(np.square(np.maximum(product(full["up"][e], row), 0)))
            total += product(full["down"][e], hidden) * shares[e, n]
        if step.shared_intermediate:
            hidden = rounded(np.square(np.maximum(product(full["shared_up"], row), 0)))
            total = rounded(total) + product(full["shared_down"], hidden)
        out[n] = total.astype(dtype)
    return out


def _wide(step: ExpertsStep, matrix: str, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """A matrix in float32."""
    values = weights[matrix].astype(np.float32)
    if matrix not in step.formats:
        return values
    scale = weights[f"{matrix}_scale"].astype(np.float32)
    if f"{matrix}_global_scale" in weights:
        scale = scale * weights[f"{matrix}_global_scale"].astype(np.float32)
    if scale.ndim < values.ndim:
        return values * scale[:, None]
    return values * np.repeat(scale, values.shape[-1] // scale.shape[-1], axis=-1)


@dataclass
class ExpertStandIn:
    """Computes experts of layers; `open` has the form the runtime asks for.

    Attributes:
        cuda: What it enqueues on.
        bound: How many are bound now.
        runs: Layers that were enqueued, in order.
        opened: Folders it was opened for.
        closed: Whether it was closed.
    """

    cuda: CudaStandIn
    bound: int = 0
    runs: list[int] = field(default_factory=list)
    opened: list[Path] = field(default_factory=list)
    closed: bool = False

    def open(self, folder: Path, cuda: Cuda, devices: Sequence[int]) -> ExpertStandIn:
        self.opened.append(folder)
        return self

    def scratch_bytes(self, step: ExpertsStep, tokens: int) -> int:
        return 4 * tokens * step.hidden * (step.top + 2)

    def bind(self, step: ExpertsStep, places: ExpertPlaces) -> _Bound:
        assert not self.closed
        assert places.scratch[1] >= self.scratch_bytes(step, places.tokens)
        self.bound += 1
        return _Bound(self, step, places)

    def close(self) -> None:
        assert not self.bound, "closed before what it bound"
        self.closed = True


@dataclass(eq=False)
class _Bound:
    owner: ExpertStandIn
    step: ExpertsStep
    places: ExpertPlaces
    open: bool = True

    def enqueue(self, stream: int) -> None:
        step, places, cuda = self.step, self.places, self.owner.cuda
        nbytes = places.tokens * step.hidden * np.dtype(_NUMPY[step.dtype]).itemsize
        shares = step.experts * places.tokens * 4
        needed = {places.x: nbytes, places.out: nbytes, places.shares: shares, places.scratch[0]: places.scratch[1]}
        for address, size in (*needed.items(), *((places.weights[role], _ref(step, role).nbytes) for role in step.weights)):
            assert cuda.device_of(address, size) == places.device
        self.owner.runs.append(step.layer)
        cuda.enqueue(stream, self._run)

    def _run(self) -> None:
        step, places = self.step, self.places
        view(places.scratch[0], (places.scratch[1],), np.uint8).fill(0xCC)  # whatever was there is not there any more
        x = view(places.x, (places.tokens, step.hidden), _NUMPY[step.dtype])
        shares = view(places.shares, (step.experts, places.tokens), np.float32)
        weights = {}
        for role, address in places.weights.items():
            ref = _ref(step, role)
            weights[role] = read_weight(view(address, (ref.nbytes,), np.uint8), ref)
        view(places.out, x.shape, x.dtype)[...] = experts_by_hand(step, x, shares, weights)

    def close(self) -> None:
        self.owner.bound -= self.open
        self.open = False


def _ref(step: ExpertsStep, role: str) -> WeightRef:
    spec = step.weights[role]
    return WeightRef(spec.dtype, tuple(map(int, spec.axes)), 0)
