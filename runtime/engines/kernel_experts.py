"""Experts between programs by compiled kernels, loaded on every device that runs some of their layers.

NVIDIA's driver API alone: neither Triton nor torch. A launch is one call of the driver with
arguments that were packed once; what changes from pass to pass is in device memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.bundle import ExpertsStep
from twotower.errors import EngineMismatchError
from twotower.kernels import scratch_bytes
from twotower.kernels.cubin_manifest import Cubin, Manifest, build_command, read_manifest
from twotower.kernels.launches import SCRATCH, Launch, launches
from twotower.kernels.shape import shape_of
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.experts import ExpertPlaces

__all__ = ["ExpertCode", "ExpertStep", "KernelExperts"]

_C_TYPES: Mapping[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
"""Of numbers; a pointer is 64 bits."""


@dataclass(frozen=True, slots=True)
class _Function:
    cubin: Cubin
    handle: Any


class ExpertCode:
    """The kernels of one layer shape on one device.

    Args:
        manifest: The files.
        cuda: The calls.
        device: The device; it is made current.

    Raises:
        EngineMismatchError: there are no kernels for its compute capability.
        BundleError: a file is missing or damaged.
        DeviceError: the driver does not load one.
    """

    def __init__(self, manifest: Manifest, cuda: Cuda, device: int) -> None:
        cuda.use(device)
        self.manifest, self.device = manifest, device
        self.sm = cuda.compute_capability(device)
        self._driver = cuda.kernels
        mine = [cubin for cubin in manifest.cubins if cubin.sm == self.sm]
        if not mine:
            raise EngineMismatchError(
                f"the expert kernels of this bundle were not compiled for this GPU, SM {self.sm}",
                found=f"compiled for SM {', '.join(map(str, manifest.sms)) or 'none'}",
                do=self._rebuild(),
            )
        self._libraries: list[Any] = []
        self._functions: dict[str, _Function] = {}
        try:
            for cubin in mine:
                self._functions[cubin.kernel] = self._loaded(cubin)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path, cuda: Cuda, device: int) -> ExpertCode:
        """The kernels of a folder."""
        return cls(read_manifest(folder), cuda, device)

    def launches(self, tokens: int) -> tuple[Launch, ...]:
        """What is launched for a number of tokens."""
        return launches(self.manifest.shape, tokens, self.sm, self.manifest)

    def bind(
        self, launch: Launch, addresses: Mapping[str, int], scratch: int
    ) -> Callable[[int], None]:
        """A launch with its arguments; it takes the stream.

        Args:
            launch: Of `launches`.
            addresses: Device addresses of the arrays it names.
            scratch: Address of the scratch memory.
        """
        function = self._functions[launch.kernel]
        values = [_value(parameter, addresses, scratch) for parameter in launch.params]
        kinds = [_C_TYPES.get(kind, ctypes.c_uint64) for _, kind in function.cubin.arguments]
        kinds += [ctypes.c_uint64] * function.cubin.nulls
        values += [0] * function.cubin.nulls
        arguments = [kind(value) for kind, value in zip(kinds, values, strict=True)]
        program = launch.block, launch.shared_bytes
        return self._driver.bound_launch(function.handle, launch.grid, program, arguments)

    def close(self) -> None:
        """Unloads the kernels; nothing of them may be running."""
        while self._libraries:
            self._driver.unload(self._libraries.pop())
        self._functions.clear()

    def _rebuild(self) -> str:
        if self.sm in BUILDABLE_SMS:
            command = build_command(self.manifest.folder, {*self.manifest.sms, self.sm})
            return f"{command} compiles them, on any machine for rtx and on this one for trt"
        return f"there are none for SM {self.sm}: build with --experts dense"

    def _loaded(self, cubin: Cubin) -> _Function:
        library = self._driver.load(self.manifest.code(cubin), cubin.file)
        self._libraries.append(library)
        return _Function(
            cubin, self._driver.function(library, cubin.entry, shared_bytes=cubin.shared)
        )


class ExpertStep:
    """The experts of one layer for a number of tokens, ready to enqueue.

    Args:
        code: The kernels.
        tokens: Rows of x and out.
        addresses: Device addresses: `x`, `shares`, `out`, and the weights by the names of
            `weight_names`.
        scratch: Device address of `scratch_bytes` of memory, at a multiple of 256. Layers that run
            in turn on one stream share it.
    """

    def __init__(
        self, code: ExpertCode, tokens: int, addresses: Mapping[str, int], scratch: int
    ) -> None:
        self._launches = tuple(
            code.bind(launch, addresses, scratch) for launch in code.launches(tokens)
        )

    def __len__(self) -> int:
        """Launches."""
        return len(self._launches)

    def enqueue(self, stream: int) -> None:
        """Puts the launches on a stream of the device, which must be current.

        Raises:
            DeviceError: the driver refuses one.
        """
        for launch in self._launches:
            launch(stream)


def _value(parameter: str | int, addresses: Mapping[str, int], scratch: int) -> int:
    if isinstance(parameter, int):
        return parameter
    if parameter.startswith(SCRATCH):
        return scratch + int(parameter.removeprefix(SCRATCH))
    return addresses[parameter]


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
