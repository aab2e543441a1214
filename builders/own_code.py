"""The code that engines are made by, as a number: what was made by other code may be other engines."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

__all__ = ["digest_of", "kernel_source", "planning_source"]

_PACKAGE = Path(__file__).parents[1]


def kernel_source() -> str:
    """SHA-256 of what kernels are made from: another version of twotower may have others."""
    return digest_of("kernels")


def planning_source() -> str:
    """SHA-256 of what decides into which engines a bundle is built, and how."""
    return digest_of("builders", "config", "graph_lint", "weights", "spec.py")


@cache
def digest_of(*names: str) -> str:
    """SHA-256 of source files of this package, and of all in its folders of these names."""
    # Read and not imported: engines that are kept need none of it.
    digest = hashlib.sha256()
    for name in names:
        path = _PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
