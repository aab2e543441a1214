"""Folders that appear whole or not at all: written beside their name, renamed at the end."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.errors import TwoTowerError

__all__ = ["link_file", "require_room", "unpublished"]

logger = logging.getLogger(__name__)

_SLACK_BYTES = 64 << 20  # graphs, manifest, tokenizer and the file system's own needs


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


def require_room(output: Path, nbytes: int, *, error: type[TwoTowerError], smaller: str) -> None:
    """Refuses a folder that exists, and a disk without room for so many bytes and some more.

    Args:
        output: The folder to make.
        nbytes: Of what will be large in it.
        error: What to raise.
        smaller: What else to do than to free space.

    Raises:
        TwoTowerError: of the class `error`.
    """
    if output.exists() or output.is_symlink():
        raise error(
            f"the output folder '{output}' exists already",
            found="a bundle is never overwritten",
            do="name a new folder with -o, or remove that one",
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = nbytes + _SLACK_BYTES, shutil.disk_usage(parent).free
    if needed > free:
        raise error(
            f"not enough disk space for '{output}'",
            found=f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on {parent}",
            do=f"free space, {smaller}",
        )


def link_file(source: Path, target: Path) -> None:
    """A second name for a file of a bundle, which is never changed in place; a copy where the file system has no links."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
