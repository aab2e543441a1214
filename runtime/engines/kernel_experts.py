"""Experts between programs by compiled kernels: the code of a target on every device that runs some of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twotower.bundle import ExpertsStep
from twotower.kernels import scratch_bytes
from twotower.kernels.steps import shape_of
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.experts import ExpertPlaces
from twotower.runtime.experts import ExpertCode, ExpertStep

__all__ = ["KernelExperts"]


class KernelExperts:
    """The kernels of a target, loaded; see `ExpertRuntime`.

    Args:
        folder: The target's folder.
        cuda: The calls.
        places: Which code goes to which device.

    Raises:
        EngineMismatchError: there is no code for a device.
        BundleError: a file is missing or damaged.
        DeviceError: the driver does not load one.
    """

    def __init__(self, folder: Path, cuda: Cuda, places: Iterable[tuple[str, int]]) -> None:
        self._codes: dict[tuple[str, int], ExpertCode] = {}
        with Cleanup(self.close) as undo:
            for code, device in dict.fromkeys(places):
                self._codes[code, device] = ExpertCode.open(folder / code, cuda, device)
            undo.pop_all()

    def scratch_bytes(self, step: ExpertsStep, tokens: int) -> int:
        return scratch_bytes(shape_of(step), tokens)

    def bind(self, step: ExpertsStep, places: ExpertPlaces) -> _Bound:
        addresses = {"x": places.x, "shares": places.shares, "out": places.out, **places.weights}
        code = self._codes[step.code, places.device]
        return _Bound(ExpertStep(code, places.tokens, addresses, places.scratch[0]))

    def close(self) -> None:
        codes = list(self._codes.values())
        self._codes.clear()
        close_all(code.close for code in codes)


class _Bound:
    """One layer's launches; nothing is to be freed."""

    def __init__(self, step: ExpertStep) -> None:
        self.enqueue = step.enqueue

    def close(self) -> None:
        return
