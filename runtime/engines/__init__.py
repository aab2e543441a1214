"""Engines of a bundle by target: one opener a target, imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from twotower.bundle import Bundle
from twotower.errors import ConfigError, EngineMismatchError
from twotower.extras import TARGET_EXTRA, install_command
from twotower.hardware import probe_machine
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.towers import OpenOptions, Towers
from twotower.runtime.engines.trt_engine import open_tensorrt
from twotower.tensorrt_library import load_tensorrt, load_tensorrt_rtx

__all__ = ["OPENERS", "STREAMED", "OpenOptions", "open_cuda", "open_towers", "require_opener"]


def _open_ort_cpu(bundle: Bundle, options: OpenOptions) -> Towers:
    with _libraries("ort-cpu"):
        from twotower.runtime.engines.ort import open_ort_cpu
    if options.devices:
        raise ConfigError(
            "target ort-cpu uses no GPU",
            found=f"GPUs {', '.join(map(str, options.devices))} were asked for",
            do="leave out --devices, or choose a GPU target with --target",
        )
    return open_ort_cpu(bundle, threads=options.threads, progress=options.progress)


def _open_ort_cuda(bundle: Bundle, options: OpenOptions) -> Towers:
    with _libraries("ort-cuda"):
        from twotower.runtime.engines.ort import CudaLibrary
        from twotower.runtime.engines.ort_cuda import open_ort_cuda

        cuda = _load_cuda()
    return open_ort_cuda(bundle, CudaLibrary(), cuda, options)


def _open_rtx(bundle: Bundle, options: OpenOptions) -> Towers:
    with _libraries("rtx"):
        library, cuda = load_tensorrt_rtx(), _load_cuda()
    return open_tensorrt(bundle, library, cuda, _on_this_machine(options))


def _open_trt(bundle: Bundle, options: OpenOptions) -> Towers:
    with _libraries("trt"):
        library, cuda = load_tensorrt(), _load_cuda()
    return open_tensorrt(bundle, library, cuda, _on_this_machine(options))


def _on_this_machine(options: OpenOptions) -> OpenOptions:
    machine = probe_machine()
    return replace(options, gpus=machine.gpus, any_sm=machine.rtx_any_sm)


@contextmanager
def _libraries(target: str) -> Iterator[None]:
    """Says how to install what a target's opener imports."""
    try:
        yield
    except (ImportError, OSError) as e:  # OSError: the bindings are there and the library is not
        raise EngineMismatchError(
            f"target {target} cannot run here",
            found=f"a library is missing: {e}",
            do=install_command(TARGET_EXTRA[target]),
        ) from e


def _load_cuda() -> Cuda:
    from cuda.bindings import driver, runtime

    return Cuda(runtime, driver=driver)


OPENERS: dict[str, Callable[[Bundle, OpenOptions], Towers]] = {
    "ort-cpu": _open_ort_cpu,
    "ort-cuda": _open_ort_cuda,
    "rtx": _open_rtx,
    "trt": _open_trt,
}
"""What opens the engines of each target, by its name."""


STREAMED = frozenset({"rtx", "trt"})
"""Targets that read weights to a device on opening and compare them with their SHA-256 then."""


def require_opener(target: str) -> None:
    """Refuses, by EngineMismatchError, a target this version can build but not run."""
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
    return OPENERS[target](bundle, options or OpenOptions())


def open_cuda() -> Cuda:
    """The CUDA calls without an engine; EngineMismatchError without NVIDIA's bindings.

    Importing them needs no driver; the first call does.
    """
    try:
        return _load_cuda()
    except (ImportError, OSError) as e:
        raise EngineMismatchError(
            "CUDA cannot be used here",
            found=f"a library is missing: {e}",
            do="`pip install cuda-bindings`, which the extras `gpu` and `rtx` bring",
        ) from e
