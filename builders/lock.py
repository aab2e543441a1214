"""One build at a time: a lock on a file, let go by the system when its holder dies."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked"]


@contextmanager
def locked(path: Path, *, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which is made if it is not there and stays.

    Args:
        path: The lock's file.
        waiting: Called once if another process holds it.

    Raises:
        OSError: the file cannot be made.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ImportError:  # Windows: a build there is protected by its renames alone
        yield
        return
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
