"""What takes seconds to make is made once a run, also where several processes share the tests."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["made_once", "shared_folder"]


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all processes of a run see."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder filled by `make` in the first process that wants it; the others get copies."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    shared = shared_folder(factory, "once")
    whole, part = shared / name, shared / f"{name}.part"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(part, ignore_errors=True)  # of a process in which it failed
            part.mkdir()
            make(part)
            part.rename(whole)
    return Path(shutil.copytree(whole, factory.mktemp(name) / name))
