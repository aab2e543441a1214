"""Engines of a bundle by target: one opener a target, imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from twotower.bundle import Bundle, Progress
from twotower.errors import EngineMismatchError
from twotower.runtime.engines.towers import Towers

__all__ = ["OPENERS", "OpenOptions", "open_towers", "require_opener"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Options of opening engines.

    Attributes:
        threads: Threads a CPU engine computes with; 0 leaves the choice to the library.
        devices: GPUs by number; empty for the first.
        graphs: Whether passes are captured as CUDA graphs.
        progress: Called with (bytes hashed, bytes to hash) while engine files are checked.
    """

    threads: int = 0
    devices: tuple[int, ...] = ()
    graphs: bool = True
    progress: Progress | None = None


def _ort_cpu(bundle: Bundle, options: OpenOptions) -> Towers:
    from twotower.runtime.engines.ort import open_ort_cpu

    return open_ort_cpu(bundle, threads=options.threads, progress=options.progress)


OPENERS: dict[str, Callable[[Bundle, OpenOptions], Towers]] = {"ort-cpu": _ort_cpu}
"""Target name -> opener of its engines."""


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
        EngineMismatchError: unknown target, its library is not installed, or the engine does not fit.
    """
    require_opener(target)
    try:
        return OPENERS[target](bundle, options or OpenOptions())
    except ImportError as e:
        raise EngineMismatchError(
            f"target {target} cannot run here",
            found=f"a library is missing: {e}",
            do="install the extra it needs, e.g. `pip install 'twotower[cpu]'`",
        ) from e
