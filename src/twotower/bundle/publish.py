"""Folders that appear whole or not at all: written beside their name, renamed at the end."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["unpublished"]

logger = logging.getLogger(__name__)


@contextmanager
def unpublished(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes it if the block succeeds and disappears if it does not.

    What killed processes left behind under that name is removed; what a living one is writing is left alone.
    """
    parent = output.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    stem = f".{output.name}.partial."
    for left in parent.glob(f"{stem}*"):
        owner = left.name.removeprefix(stem)
        if owner.isdigit() and not _alive(int(owner)):
            logger.info("removing %s, left by a killed process", left)
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{stem}{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
