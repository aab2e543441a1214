"""Environments that hold the wheel with some of its extras and nothing else."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

from tests.helpers.source import ROOT

__all__ = ["PARENTS", "Environments", "required"]

PARENTS = {
    "calibration": "export",
    "evaluate": "calibration",
    "export,cpu": "export",
    "calibration,cpu": "calibration",
    "evaluate,cpu": "evaluate",
    "kernels,rtx": "rtx",
}
"""Extras whose packages are among those of others, from whose files an environment starts."""


class Environments:
    """Environments by their extras, separated by commas; `none` for the wheel alone.

    Args:
        folder: Where they are made, each by the first process that wants it.
        wheel: The wheel.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self._folder = folder
        self._wheel = wheel

    def made(self, extras: str) -> Path:
        """The folder of an environment."""
        name = extras.replace(",", "-")
        folder, whole = self._folder / name, self._folder / f"{name}.whole"
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process in which it failed
                self._make(extras, folder)
                whole.touch()
        return folder

    def _make(self, extras: str, folder: Path) -> None:
        if parent := PARENTS.get(extras):
            _start_from(self.made(parent), folder)
        options = {"venv": folder, "extras": extras, "wheel": self._wheel}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "tools" / "install.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, extras: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs `twotower` there, outside the repository and without its paths."""
        return self._run(extras, "twotower", *words)

    def run_module(self, extras: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs `python -m` there, likewise."""
        return self._run(extras, "python", "-m", *words)

    def run_code(self, extras: str, code: str) -> subprocess.CompletedProcess[str]:
        """Runs `python -c` there, likewise."""
        return self._run(extras, "python", "-c", code)

    def _run(self, extras: str, command: str, *words: str) -> subprocess.CompletedProcess[str]:
        folder = self.made(extras)
        full = [str(_commands(folder) / command), *words]
        return subprocess.run(
            full, cwd=folder, env=_clean(), capture_output=True, text=True, check=False
        )

    def installed(self, extras: str) -> dict[str, Distribution]:
        """Its distributions by their normalized names."""
        (site,) = self.made(extras).rglob("site-packages")
        return {_normalized(d.name): d for d in distributions(path=[str(site)])}


def required(installed: dict[str, Distribution], name: str, extras: frozenset[str]) -> set[str]:
    """Names of all distributions that one requires with some extras, directly or indirectly."""
    seen: set[tuple[str, frozenset[str]]] = set()
    pending = [(name, extras)]
    while pending:
        current = pending.pop()
        if current in seen or current[0] not in installed:
            continue
        seen.add(current)
        pending += [
            (_normalized(r.name), frozenset(r.extras))
            for r in _asked(installed[current[0]], current[1])
        ]
    return {found for found, _ in seen}


def _asked(distribution: Distribution, extras: frozenset[str]) -> Iterator[Requirement]:
    for text in distribution.requires or ():
        requirement = Requirement(text)
        # Windows counts too: pip has been seen to install what only a version it had weighed and
        # dropped asks for on this system.
        systems = ({}, {"sys_platform": "win32"})
        chosen = ({"extra": extra, **system} for extra in ("", *extras) for system in systems)
        if requirement.marker is None or any(
            requirement.marker.evaluate(environment) for environment in chosen
        ):
            yield requirement


def _commands(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin")


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _start_from(parent: Path, folder: Path) -> None:
    """Links the parent's packages into a new folder, but for the wheel itself."""
    (site,) = parent.rglob("site-packages")
    imports = """import importlib.util
for name in ('torch', 'onnx_ir', 'onnx'):
    if importlib.util.find_spec(name): __import__(name)"""
    # Compiled here, once.
    subprocess.run([str(_commands(parent) / "python"), "-c", imports], env=_clean(), check=True)
    ours = shutil.ignore_patterns("twotower", "twotower-*")
    shutil.copytree(site, folder / site.relative_to(parent), copy_function=os.link, ignore=ours)
