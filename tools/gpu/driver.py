"""CUDA by NVIDIA's bindings alone: memory, streams, graphs, and kernels from cubins."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Driver", "Kernel"]

_NON_BLOCKING = 1
_THREAD_LOCAL = 1
_LEAST_BYTES = 256
_FREE_SHARED = 48 << 10
"""Bytes of shared memory a kernel may have without asking for more."""

_C_TYPES = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


class Driver:
    """Calls with their results checked, on the primary context of GPU 0.

    Args:
        driver: `cuda.bindings.driver`, or something with its functions; likewise
        runtime: `cuda.bindings.runtime`.

    Raises:
        RuntimeError: a call failed; it names the call and the library's error.
    """

    def __init__(self, driver: Any, runtime: Any) -> None:
        self.driver, self.runtime = driver, runtime
        self._copy = runtime.cudaMemcpyKind.cudaMemcpyDefault
        self.call("cudaSetDevice", 0)
        self.call("cudaFree", 0)  # makes the primary context current

    def call(self, name: str, *args: Any) -> Any:
        """The result of a call of either API: none, one, or a tuple of several."""
        api = self.runtime if name.startswith("cuda") else self.driver
        code, *results = getattr(api, name)(*args)
        if int(code):
            raise RuntimeError(f"{name}: {code!r}")
        return results[0] if len(results) == 1 else tuple(results)

    def compute_capability(self) -> int:
        """Of GPU 0, e.g. 90."""
        names = self.runtime.cudaDeviceAttr
        major = self.call("cudaDeviceGetAttribute", names.cudaDevAttrComputeCapabilityMajor, 0)
        minor = self.call("cudaDeviceGetAttribute", names.cudaDevAttrComputeCapabilityMinor, 0)
        return 10 * int(major) + int(minor)

    def allocate(self, size: int) -> int:
        """Address of device memory that stays until the process ends."""
        return int(self.call("cudaMalloc", max(_LEAST_BYTES, size)))

    def upload(self, array: np.ndarray, address: int | None = None) -> int:
        """Copies an array to device memory, new unless an address is given; returns the address."""
        array = np.ascontiguousarray(array)
        target = self.allocate(array.nbytes) if address is None else address
        self.call("cudaMemcpy", target, array.ctypes.data, array.nbytes, self._copy)
        return target

    def download(self, array: np.ndarray, address: int) -> np.ndarray:
        """Fills an array from device memory."""
        self.call("cudaMemcpy", array.ctypes.data, address, array.nbytes, self._copy)
        return array

    def stream(self) -> int:
        """A stream that has no implicit order with the default one."""
        return int(self.call("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def synchronize(self, stream: int) -> None:
        """Waits for a stream."""
        self.call("cudaStreamSynchronize", stream)

    def captured(self, stream: int, enqueue: Callable[[], Any]) -> Any:
        """A graph of what `enqueue` puts on a stream, ready to launch."""
        self.call(
            "cudaStreamBeginCapture", stream, self.runtime.cudaStreamCaptureMode(_THREAD_LOCAL)
        )
        try:
            enqueue()
        finally:  # a stream that stays in a capture is lost
            graph = self.call("cudaStreamEndCapture", stream)
        return self.call("cudaGraphInstantiate", graph, 0)


class Kernel:
    """The kernel of a cubin, ready to launch.

    Args:
        driver: The calls.
        cubin: The file.
        facts: Its entry in the list beside it; see `tools.gpu.kernels`.

    Attributes:
        loaded_by: `library` or `module`, with the reason.
    """

    def __init__(self, driver: Driver, cubin: Path, facts: dict[str, Any]) -> None:
        self._driver, self._facts = driver, facts
        self._code = ctypes.create_string_buffer(cubin.read_bytes())  # must outlive the kernel
        entry, address = facts["entry"].encode(), ctypes.addressof(self._code)
        try:
            library = driver.call("cuLibraryLoadData", address, [], [], 0, [], [], 0)
            kernel = driver.call("cuLibraryGetKernel", library, entry)
            self._function = driver.call("cuKernelGetFunction", kernel)
            self.loaded_by = "library"
        except (RuntimeError, TypeError) as e:
            module = driver.call("cuModuleLoadData", address)
            self._function = driver.call("cuModuleGetFunction", module, entry)
            self.loaded_by = f"module, because {e}"
        if facts["shared"] > _FREE_SHARED:
            names = driver.driver.CUfunction_attribute
            most = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.call("cuFuncSetAttribute", self._function, most, facts["shared"])

    def bind(
        self, grid: tuple[int, int, int], values: Sequence[int | float]
    ) -> Callable[[int], None]:
        """A launch with these arguments, whose table is made once; it takes the stream."""
        kinds = [_C_TYPES.get(kind, ctypes.c_uint64) for kind in self._facts["arguments"]]
        kinds += [ctypes.c_uint64] * self._facts["nulls"]
        given = [*values, *[0] * self._facts["nulls"]]
        held = [kind(value) for kind, value in zip(kinds, given, strict=True)]
        table = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        threads, shared = self._facts["threads"], self._facts["shared"]
        launch, function = self._driver.driver.cuLaunchKernel, self._function

        def run(stream: int, held: Any = (held, table)) -> None:
            arguments = ctypes.addressof(held[1])
            (code,) = launch(function, *grid, threads, 1, 1, shared, stream, arguments, 0)
            if int(code):
                raise RuntimeError(f"cuLaunchKernel: {code!r}")

        return run
