"""Experts between programs by compiled kernels, through NVIDIA's driver API alone.

Launch arguments are packed once; what changes from pass to pass is in device memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from twotower.bundle import ExpertsStep
from twotower.errors import EngineMismatchError
from twotower.kernels.cubin_manifest import Cubin, Manifest, build_command, read_manifest
from twotower.kernels.launches import SCRATCH, Launch, launches
from twotower.kernels.tilings import BUILDABLE_SMS
from twotower.runtime.cleanup import Cleanup, close_all
from twotower.runtime.cuda.calls import Cuda

_C_TYPES: Mapping[str, Any] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}
"""Of numbers; a pointer is 64 bits."""


class ExpertCode:
    """The kernels of one layer shape on one device.

    Raises:
        EngineMismatchError: there are no kernels for its compute capability.
        BundleError: a file is missing or damaged.
        DeviceError: the driver does not load one.
    """

    def __init__(self, folder: Path, cuda: Cuda, device: int) -> None:
        manifest = read_manifest(folder)
        cuda.use(device)
        self.manifest, self.device = manifest, device
        self.sm = cuda.compute_capability(device)
        self._driver = cuda.kernels
        mine = [cubin for cubin in manifest.cubins if cubin.sm == self.sm]
        if not mine:
            raise EngineMismatchError(
                f"the expert kernels of this bundle were not compiled for this GPU, SM {self.sm}",
                found=f"compiled for SM {', '.join(map(str, manifest.sms)) or 'none'}",
                do=_rebuild(manifest, self.sm),
            )
        self._libraries: list[Any] = []
        self._functions: dict[str, tuple[Cubin, Any]] = {}
        with Cleanup(self.close) as undo:
            for cubin in mine:
                library = self._driver.load(manifest.code(cubin), cubin.file)
                self._libraries.append(library)
                handle = self._driver.function(library, cubin.entry, shared_bytes=cubin.shared)
                self._functions[cubin.kernel] = (cubin, handle)
            undo.pop_all()

    def launches(self, tokens: int) -> tuple[Launch, ...]:
        """What is launched for a number of tokens."""
        return launches(self.manifest.shape, tokens, self.sm, self.manifest)

    def bind(
        self, launch: Launch, addresses: Mapping[str, int], scratch: int
    ) -> Callable[[int], None]:
        """A launch with its arguments as a function of the stream; addresses are by array name."""
        cubin, handle = self._functions[launch.kernel]
        arguments = []
        for parameter, (_, kind) in zip(launch.params, cubin.arguments, strict=True):
            if isinstance(parameter, int):
                value = parameter
            elif parameter.startswith(SCRATCH):
                value = scratch + int(parameter.removeprefix(SCRATCH))
            else:
                value = addresses[parameter]
            arguments.append(_C_TYPES.get(kind, ctypes.c_uint64)(value))
        arguments += [ctypes.c_uint64(0) for _ in range(cubin.nulls)]
        return self._driver.bound_launch(handle, launch, arguments)

    def close(self) -> None:
        """Unloads the kernels; nothing of them may be running."""
        while self._libraries:
            self._driver.unload(self._libraries.pop())
        self._functions.clear()


def _rebuild(manifest: Manifest, sm: int) -> str:
    if sm in BUILDABLE_SMS:
        command = build_command(manifest.folder, {*manifest.sms, sm})
        return f"{command} compiles them, on any machine for rtx and on this one for trt"
    return f"there are none for SM {sm}: build with --experts dense"


class ExpertStep:
    """The experts of one layer for a number of tokens, ready to enqueue; closing frees nothing.

    Args:
        tokens: Rows of x and out.
        addresses: Device addresses: `x`, `shares`, `out`, and the weights by the names of
            `weight_names`.
        scratch: Device address of `scratch_bytes` of memory, at a multiple of 256. Layers that run
            in turn on one stream share it.

    Raises:
        RequestError: there are no kernels for so many tokens.
    """

    def __init__(
        self, code: ExpertCode, tokens: int, addresses: Mapping[str, int], scratch: int
    ) -> None:
        self.device = code.device
        self._launches = tuple(
            code.bind(launch, addresses, scratch) for launch in code.launches(tokens)
        )

    def __len__(self) -> int:
        """Launches."""
        return len(self._launches)

    def enqueue(self, stream: int) -> None:
        """Enqueues the launches on the current device; DeviceError if refused.

        They are the same whatever the routing.
        """
        for launch in self._launches:
            launch(stream)


class KernelExperts:
    """The kernels of a target, loaded on every device that runs some of them.

    Raises:
        EngineMismatchError: there is no code for a device.
        BundleError: a file is missing or damaged.
        DeviceError: the driver does not load one.
    """

    def __init__(self, folder: Path, cuda: Cuda, places: Iterable[tuple[str, int]]) -> None:
        self._codes: dict[tuple[str, int], ExpertCode] = {}
        with Cleanup(self.close) as undo:
            for code, device in dict.fromkeys(places):
                self._codes[code, device] = ExpertCode(folder / code, cuda, device)
            undo.pop_all()

    def code(self, step: ExpertsStep, device: int) -> ExpertCode:
        """The kernels of a layer on a device."""
        return self._codes[step.code, device]

    def close(self) -> None:
        """Unloads everything; idempotent."""
        codes = list(self._codes.values())
        self._codes.clear()
        close_all(code.close for code in codes)
