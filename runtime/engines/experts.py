"""Experts between programs, as the runtime asks for them: what launches their kernels is a value, and may be a fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from twotower.bundle import ExpertsStep
from twotower.runtime.cuda.calls import Cuda

__all__ = ["BoundExperts", "ExpertPlaces", "ExpertRuntime", "OpenExperts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPlaces:
    """Where the experts of one layer find everything, on one device.

    Attributes:
        device: Which.
        tokens: N, rows times positions.
        x: Address of `experts_in` [N,D]; likewise
        shares: of `shares` [experts,N] float32, and
        out: of `experts_out` [N,D].
        weights: Address of each weight, by role.
        scratch: Address and bytes of memory that nothing else uses while they run.
    """

    device: int
    tokens: int
    x: int
    shares: int
    out: int
    weights: Mapping[str, int]
    scratch: tuple[int, int]


class BoundExperts(Protocol):
    """The experts of one layer at fixed addresses."""

    def enqueue(self, stream: int) -> None:
        """Puts them on a stream of their device, which is current: the same launches whatever the routing.

        Raises:
            DeviceError: the driver refuses a launch.
        """
        ...

    def close(self) -> None:
        """Lets go of what was made for it; idempotent."""
        ...


class ExpertRuntime(Protocol):
    """What computes experts on devices."""

    def scratch_bytes(self, step: ExpertsStep, tokens: int) -> int:
        """Bytes of scratch memory for so many tokens."""
        ...

    def bind(self, step: ExpertsStep, places: ExpertPlaces) -> BoundExperts:
        """The experts of a layer, ready to run.

        Raises:
            RequestError: there are no kernels for so many tokens.
        """
        ...

    def close(self) -> None:
        """Frees what was loaded; idempotent."""
        ...


OpenExperts = Callable[[Path, Cuda, Sequence[tuple[str, int]]], ExpertRuntime]
"""Given the target's folder, the calls, and which code of experts goes to which device."""
