"""Engines of a bundle by target: one opener a target, imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twotower.bundle import Bundle, Progress
from twotower.errors import ConfigError, EngineMismatchError
from twotower.extras import TARGET_EXTRA, install_command
from twotower.hardware import probe_machine
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.tensorrt_open import TensorRTOptions, open_tensorrt
from twotower.runtime.engines.towers import Towers
from twotower.tensorrt_library import Flavour, load_tensorrt, load_tensorrt_rtx

__all__ = ["OPENERS", "STREAMED", "OpenOptions", "open_cuda", "open_towers", "require_opener"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Options of opening engines.

    Attributes:
        threads: Threads a CPU engine computes with; 0 for one a core that this process may use, or
            one for a small model.
        devices: GPUs by number; empty for the first.
        graphs: Whether passes are captured as CUDA graphs.
        progress: Called with (bytes hashed, bytes to hash) while engine files are checked.
        loading: Called with (bytes loaded, bytes to load) while weights go to a device.
    """

    threads: int = 0
    devices: tuple[int, ...] = ()
    graphs: bool = True
    progress: Progress | None = None
    loading: Progress | None = None


Opener = Callable[[Bundle, OpenOptions], Towers]


def _ort_cpu() -> Opener:
    from twotower.runtime.engines.ort import open_ort_cpu

    def opened(bundle: Bundle, options: OpenOptions) -> Towers:
        if options.devices:
            found = f"GPUs {', '.join(map(str, options.devices))} were asked for"
            raise ConfigError(
                "target ort-cpu uses no GPU",
                found=found,
                do="leave out --devices, or choose a GPU target with --target",
            )
        return open_ort_cpu(bundle, threads=options.threads, progress=options.progress)

    return opened


def _ort_cuda() -> Opener:
    from twotower.runtime.cuda.door import load_cuda
    from twotower.runtime.engines.ort import CudaLibrary
    from twotower.runtime.engines.ort_device import OrtDeviceOptions, open_ort_cuda

    def opened(bundle: Bundle, options: OpenOptions) -> Towers:
        how = OrtDeviceOptions(
            devices=options.devices, progress=options.progress, loading=options.loading
        )
        return open_ort_cuda(bundle, CudaLibrary(), load_cuda(), how)

    return opened


def _trt() -> Opener:
    return _tensorrt(load_tensorrt())


def _rtx() -> Opener:
    return _tensorrt(load_tensorrt_rtx())


def _tensorrt(library: Flavour) -> Opener:
    from twotower.runtime.cuda.door import load_cuda

    return lambda bundle, options: open_tensorrt(
        bundle, library, load_cuda(), _tensorrt_options(options)
    )


def _tensorrt_options(options: OpenOptions) -> TensorRTOptions:
    machine = probe_machine()
    return TensorRTOptions(
        devices=options.devices,
        graphs=options.graphs,
        gpus=machine.gpus,
        any_sm=machine.rtx_any_sm,
        progress=options.progress,
        loading=options.loading,
    )


OPENERS: dict[str, Callable[[], Opener]] = {
    "ort-cpu": _ort_cpu,
    "ort-cuda": _ort_cuda,
    "rtx": _rtx,
    "trt": _trt,
}
"""Target name -> importer of what opens its engines."""


STREAMED = frozenset({"rtx", "trt"})
"""Targets that read a bundle's weights to a device when they are opened, and compare them with their SHA-256 on the way."""


def require_opener(target: str) -> None:
    """Says of a target that this version can build and not run that it is so.

    Raises:
        EngineMismatchError: there is no runtime for it.
    """
    if target not in OPENERS:
        raise EngineMismatchError(
            f"there is no runtime for target {target!r} in this version",
            found=f"targets that run: {', '.join(OPENERS)}",
            do="choose one of them with --target",
        )


def open_towers(bundle: Bundle, target: str, options: OpenOptions | None = None) -> Towers:
    """Opens the engines of one target.

    Raises:
        EngineMismatchError: unknown target, its library is not installed, or the engine does not
            fit.
    """
    require_opener(target)
    try:
        opener = OPENERS[target]()
    except (ImportError, OSError) as e:  # OSError: the bindings are there and the library is not
        raise EngineMismatchError(
            f"target {target} cannot run here",
            found=f"a library is missing: {e}",
            do=install_command(TARGET_EXTRA[target]),
        ) from e
    return opener(bundle, options or OpenOptions())


def open_cuda() -> Cuda:
    """The CUDA calls without an engine; importing them needs no driver, the first call does.

    Raises:
        EngineMismatchError: NVIDIA's bindings are not installed.
    """
    try:
        from twotower.runtime.cuda.door import load_cuda
    except (ImportError, OSError) as e:
        raise EngineMismatchError(
            "CUDA cannot be used here",
            found=f"a library is missing: {e}",
            do="`pip install cuda-bindings`, which the extras `gpu` and `rtx` bring",
        ) from e
    return load_cuda()
