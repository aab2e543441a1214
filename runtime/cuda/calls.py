"""The CUDA calls the runtime makes, each with its result checked; the library is passed in."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from twotower.errors import DeviceError, EngineMismatchError
from twotower.kernels.launches import Launch
from twotower.processors import usable_cores
from twotower.runtime.cleanup import Cleanup

logger = logging.getLogger(__name__)

_SUCCESS, _OUT_OF_MEMORY, _DRIVER_TOO_OLD, _NO_DEVICE = 0, 2, 35, 100
_PORTABLE = 1  # cudaHostAllocPortable: pinned for every device
_BLOCKING = 1  # cudaEventBlockingSync: who waits for an event sleeps, and does not spin
_NO_TIMING = 2  # cudaEventDisableTiming
_NON_BLOCKING = 1  # cudaStreamNonBlocking: no implicit order with the default stream
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may go on using CUDA
_PEER_ALREADY_ENABLED = 704
_FEW_CORES = 2

_STICKY = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719})
"""Errors of a kernel or of the memory: every later call of the process fails with the same."""


Pitched = tuple[int, int]
"""Address of the first row, and bytes from row to row."""


class CudaError(DeviceError):
    """A CUDA call that failed; `code` is the library's error number."""

    code = 0

    @property
    def lasting(self) -> bool:
        """Whether every later call of the process will fail as well."""
        return self.code in _STICKY


class Cuda:
    """CUDA runtime calls with plain numbers in and out: addresses and handles are whole numbers.

    Args:
        api: `cuda.bindings.runtime`, or something with the same functions: each returns a tuple
            that starts with an error code.
        driver: `cuda.bindings.driver` likewise, for kernels of our own; None where `api` has its
            functions too.
        cores: Processor cores there are to use. With few of them whoever waits for an event sleeps:
            spinning takes a core away from the rest of the program for all of a pass. With more it
            spins, which notices the event sooner.
    """

    def __init__(self, api: Any, *, driver: Any = None, cores: int | None = None) -> None:
        self._api = api
        self.kernels = KernelDriver(api if driver is None else driver)
        few = (usable_cores() if cores is None else cores) <= _FEW_CORES
        self._event_flags = _NO_TIMING | (_BLOCKING if few else 0)
        self._first: CudaError | None = None  # the sticky error, as it was seen first

    def _call(self, name: str, *args: Any) -> Any:
        """The results of a call, without the error code: none, one, or a tuple of several."""
        code, *results = getattr(self._api, name)(*args)
        if int(code) != _SUCCESS:
            raise self._error(name, int(code))
        if len(results) == 1:
            return results[0]
        return tuple(results)

    def _error(self, call: str, code: int) -> CudaError:
        """The error of a call; after a sticky one it tells of that, and not of what came next."""
        _, told = self._api.cudaGetErrorString(code)
        meaning = told.decode() if isinstance(told, bytes) else str(told)
        if code not in _STICKY:
            return _error(
                call,
                code,
                f"CUDA error {code}: {meaning}",
                do=_AGAIN,
            )
        if self._first is None:
            self._first = _error(
                call,
                code,
                f"CUDA error {code}: {meaning}",
                do=_NEW_PROCESS,
            )
            return self._first
        found = f"{self._first.found}; every call since then fails, now {call}"
        later = _error(call, code, found, do=_NEW_PROCESS)
        later.what = self._first.what
        return later

    def device_count(self) -> int:
        """GPUs on this machine; EngineMismatchError without a usable driver or GPU."""
        try:
            return int(self._call("cudaGetDeviceCount"))
        except CudaError as e:
            if e.code not in (_DRIVER_TOO_OLD, _NO_DEVICE):
                raise
            if e.code == _NO_DEVICE:
                what = "there is no NVIDIA GPU here"
                found = "the driver is there and no GPU is visible (CUDA_VISIBLE_DEVICES?)"
            else:
                what, found = "the NVIDIA driver is missing or too old", "no driver"
                if driver := int(self._call("cudaDriverGetVersion")):
                    needed = _version(int(self._call("cudaRuntimeGetVersion")))
                    found = f"the driver supports CUDA {_version(driver)}, "
                    found += f"this environment needs {needed}"
            raise EngineMismatchError(
                what,
                found=found,
                do="install or update the driver (`nvidia-smi` shows it), or use "
                "`--target ort-cpu`, which needs none",
            ) from e

    def use(self, device: int) -> None:
        """Makes a device current for the calling thread."""
        self._call("cudaSetDevice", device)

    def compute_capability(self, device: int) -> int:
        """Of a device, for example 90."""
        names = self._api.cudaDeviceAttr
        major = self._call(
            "cudaDeviceGetAttribute", names.cudaDevAttrComputeCapabilityMajor, device
        )
        minor = self._call(
            "cudaDeviceGetAttribute", names.cudaDevAttrComputeCapabilityMinor, device
        )
        return 10 * int(major) + int(minor)

    def free_memory(self) -> tuple[int, int]:
        """Free and all bytes of the current device."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def enable_peer(self, other: int) -> None:
        """Lets the current device access a peer's memory; without it copies go via the host."""
        try:
            self._call("cudaDeviceEnablePeerAccess", other, 0)
        except CudaError as e:
            self.forget_error()  # or whoever asks for the last error next would take it for theirs
            if e.code != _PEER_ALREADY_ENABLED:
                logger.info(
                    "no direct way to the memory of device %d (%s): copies go by way of the host",
                    other,
                    e.found,
                )

    def allocate(self, size: int) -> int:
        """Address of device memory; MemoryError if there is not enough."""
        try:
            return int(self._call("cudaMalloc", size))
        except CudaError as e:
            if e.code != _OUT_OF_MEMORY:
                raise
            raise MemoryError(e.found) from e

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_pinned(self, size: int) -> int:
        """Address of host memory a device copies from and to without a detour."""
        return int(self._call("cudaHostAlloc", size, _PORTABLE))

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def bytes_at(self, address: int, size: int) -> Any:
        """Host memory as a buffer; the memory must outlive it."""
        return (ctypes.c_ubyte * size).from_address(address)

    def copy(
        self,
        target: int,
        source: int,
        size: int,
        *,
        stream: int,
    ) -> None:
        """Enqueues a copy between any two places: host, device, another device."""
        kind = self._api.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def copy_rows(
        self, target: Pitched, source: Pitched, shape: tuple[int, int], *, stream: int
    ) -> None:
        """Enqueues a copy of rows; `shape` is their number and the bytes of each."""
        rows, width = shape
        kind = self._api.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpy2DAsync", *target, *source, width, rows, kind, stream)

    def clear(self, address: int, size: int, *, stream: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, stream)

    def clear_rows(self, target: Pitched, shape: tuple[int, int], *, stream: int) -> None:
        """Enqueues zeros; `shape` is the number of rows and the bytes of each."""
        rows, width = shape
        self._call("cudaMemset2DAsync", target[0], target[1], 0, width, rows, stream)

    def create_stream(self) -> int:
        return int(self._call("cudaStreamCreateWithFlags", _NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Blocks until everything enqueued on a stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        return int(self._call("cudaEventCreateWithFlags", self._event_flags))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def record(self, event: int, *, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        """Blocks until an event has happened."""
        self._call("cudaEventSynchronize", event)

    def stream_waits(self, stream: int, event: int) -> None:
        """Lets what is enqueued later wait for an event."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def begin_capture(self, stream: int) -> None:
        self._call("cudaStreamBeginCapture", stream, self._api.cudaStreamCaptureMode(_THREAD_LOCAL))

    def end_capture(self, stream: int) -> int:
        """Leaves a capture; returns the graph, or 0 for none."""
        graph = self._call("cudaStreamEndCapture", stream)
        return int(graph) if graph else 0

    def instantiate(self, graph: int) -> int:
        """A graph ready to launch; the captured one is let go."""
        with Cleanup(partial(self.drop_graph, graph)):
            return int(self._call("cudaGraphInstantiate", graph, 0))

    def drop_graph(self, graph: int) -> None:
        """Frees a graph that is not to be instantiated (any more)."""
        if graph:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: int, *, stream: int) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def forget_error(self) -> None:
        """Clears CUDA's last error after a call that was expected to fail.

        NVIDIA's bindings hold a CUDA runtime of their own: TensorRT and ONNX Runtime keep other
        errors.
        """
        self._api.cudaGetLastError()


_AGAIN = "open the bundle again; if it happens again, `twotower doctor BUNDLE` narrows it down"
_NEW_PROCESS = (
    "start a new process, this one cannot use the GPU any more; `twotower doctor` narrows it down"
)


def _error(
    call: str,
    code: int,
    found: str,
    *,
    do: str,
) -> CudaError:
    error = CudaError(f"the GPU reported an error in {call}", found=found, do=do)
    error.code = code
    return error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


_FREE_SHARED = 48 << 10
"""Bytes of dynamic shared memory a kernel may have without asking for more."""


class KernelDriver:
    """Calls of the driver API (`cuda.bindings.driver` or a fake) in the current context."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def _call(self, name: str, *args: Any) -> Any:
        code, *results = getattr(self._api, name)(*args)
        if int(code):
            raise _driver_error(name, code)
        return results[0] if results else None

    def load(self, code: bytes, name: str) -> Any:
        """A kernel library from a cubin's bytes; DeviceError, with `name`, if it is refused."""
        held = ctypes.create_string_buffer(code)  # read during the call only
        try:
            return self._call("cuLibraryLoadData", ctypes.addressof(held), [], [], 0, [], [], 0)
        except DeviceError as e:
            raise DeviceError(
                f"the NVIDIA driver does not load the compiled kernel {name}",
                found=e.found,
                do="update the driver (`nvidia-smi` shows it), or build again with `--sm` of this "
                "GPU",
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
        """A launch as a function of the stream; its ctypes arguments are packed once, here."""
        held = tuple(arguments)
        table = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        head = (function, *launch.grid, launch.block, 1, 1, launch.shared_bytes)
        address = ctypes.addressof(table)
        call = self._api.cuLaunchKernel

        def run(stream: int, _held: Any = (held, table)) -> None:
            (code,) = call(*head, stream, address, 0)
            if code:
                raise _driver_error("cuLaunchKernel", code)

        return run


def _driver_error(call: str, code: Any) -> DeviceError:
    return DeviceError(
        f"the NVIDIA driver reported an error in {call}",
        found=f"CUDA error {int(code)} ({getattr(code, 'name', 'unnamed')})",
        do="start a new process; if it happens again, `twotower doctor BUNDLE` narrows it down",
    )
