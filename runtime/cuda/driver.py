"""Kernels from compiled files, by CUDA's driver API: loaded, found by name, and launched with arguments packed beforehand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from twotower.errors import DeviceError
from twotower.kernels.launches import Launch

__all__ = ["KernelDriver"]

_FREE_SHARED = 48 << 10
"""Bytes of dynamic shared memory a kernel may have without asking for more."""


class KernelDriver:
    """Calls of the driver API in the context that is current.

    Args:
        api: `cuda.bindings.driver`, or something with the same functions: each returns a tuple that
            starts with an error code.
    """

    def __init__(self, api: Any) -> None:
        self._api = api

    def _call(self, name: str, *args: Any) -> Any:
        code, *results = getattr(self._api, name)(*args)
        if int(code):
            raise _error(name, code)
        return results[0] if results else None

    def load(self, code: bytes, name: str) -> Any:
        """A library of kernels from the bytes of a cubin.

        Args:
            code: The bytes.
            name: For the error.

        Raises:
            DeviceError: the driver does not take it.
        """
        held = ctypes.create_string_buffer(code)  # read during the call only
        try:
            return self._call("cuLibraryLoadData", ctypes.addressof(held), [], [], 0, [], [], 0)
        except DeviceError as e:
            raise DeviceError(
                f"the NVIDIA driver does not load the compiled kernel {name}",
                found=e.found,
                do="update the driver (`nvidia-smi` shows it), or build again with `--sm` of this GPU",
            ) from e

    def unload(self, library: Any) -> None:
        """Lets a library go."""
        self._call("cuLibraryUnload", library)

    def function(self, library: Any, entry: str, *, shared_bytes: int) -> Any:
        """A kernel of a library, allowed so much dynamic shared memory."""
        kernel = self._call("cuLibraryGetKernel", library, entry.encode())
        function = self._call("cuKernelGetFunction", kernel)
        if shared_bytes > _FREE_SHARED:
            most = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, most, shared_bytes)
        return function

    def bound_launch(
        self, function: Any, launch: Launch, arguments: Sequence[Any]
    ) -> Callable[[int], None]:
        """A launch as a function of the stream.

        Args:
            function: Of `function`.
            launch: How many programs and threads, and their shared memory.
            arguments: A ctypes value each, in order. They are packed here, once.
        """
        held = tuple(arguments)
        table = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        head = (function, *launch.grid, launch.block, 1, 1, launch.shared_bytes)
        address = ctypes.addressof(table)
        call = self._api.cuLaunchKernel

        def run(stream: int, _held: Any = (held, table)) -> None:
            (code,) = call(*head, stream, address, 0)
            if code:
                raise _error("cuLaunchKernel", code)

        return run


def _error(call: str, code: Any) -> DeviceError:
    return DeviceError(
        f"the NVIDIA driver reported an error in {call}",
        found=f"CUDA error {int(code)} ({getattr(code, 'name', 'unnamed')})",
        do="start a new process; if it happens again, `twotower doctor BUNDLE` narrows it down",
    )
