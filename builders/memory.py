"""Whether this machine has the memory a build needs, asked before it starts."""

from __future__ import annotations

from collections.abc import Mapping

from twotower.errors import BuildError

__all__ = ["require_bound", "require_build_memory"]


def require_bound(needed: Mapping[str, int], bound: int | None) -> None:
    """Refuses a bound that programs between experts do not keep: they are cut as small as they are.

    Args:
        needed: Bytes of memory each program's build takes, by file.
        bound: `--max-build-memory`.

    Raises:
        BuildError: a program needs more.
    """
    file = max(needed, key=needed.__getitem__, default=None)
    if file is not None and bound is not None and needed[file] > bound:
        raise BuildError(
            f"{file} cannot be built in so little memory",
            found=f"about {needed[file] / 1e9:.1f} GB needed, {bound / 1e9:.1f} GB are allowed; "
            "programs between experts are cut no further",
            do=f"raise --max-build-memory to {-(-needed[file] // 10**8) / 10:g}G or more, or leave it out",
        )


def require_build_memory(needed: Mapping[str, int], *, least: int, available: int, bound: int | None) -> None:
    """Refuses a build that the kernel would kill; who gives a bound of their own is trusted with it.

    Programs fit nearly everywhere; engines that hold many weights may not.

    Args:
        needed: Bytes of memory each engine's build takes, by file.
        least: The smallest `--max-build-memory` under which every graph can be cut.
        available: Bytes of memory to be had, 0 if nobody knows.
        bound: `--max-build-memory`.

    Raises:
        BuildError: an engine needs more than there is.
    """
    if bound is not None or not available or not needed:
        return
    file = max(needed, key=needed.__getitem__)
    if needed[file] <= available:
        return
    if least <= available:
        whole = available // 10**9
        cut = whole if least <= whole * 10**9 else -(-least // 10**8) / 10
        do = f"add --max-build-memory {cut:g}G, which cuts towers into several engines"
    else:
        do = (
            f"build on a machine with {least / 1e9:.1f} GB of free memory or more (the largest single layer needs that), "
            f"or add --max-build-memory {-(-least // 10**9)}G to build with swap all the same"
        )
    raise BuildError(
        f"the build of {file} does not fit this machine's memory",
        found=f"about {needed[file] / 1e9:.1f} GB needed at its peak, {available / 1e9:.1f} GB available",
        do=do,
    )
