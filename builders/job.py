"""Runs `twotower.builders.child` for one engine and reads what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower.errors import BuildError

__all__ = ["run_job"]


def run_job(job: dict[str, Any], scratch: Path, *, tick: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Builds one engine in a child process, which dies with this call.

    Args:
        job: What to build; see `child.main`.
        scratch: A folder for the job's file.
        tick: Called with (phase, step, steps).

    Returns:
        What the build observed.

    Raises:
        BuildError: the library refused the graph, or the process was killed.
    """
    file = scratch / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    # The package is found where this very file was found, whatever the child's working directory.
    paths = os.pathsep.join(filter(None, (_root(), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "twotower.builders.child", str(file)]
    with (scratch / "stderr.txt").open("w+b") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": paths})
        try:
            result = _followed(child, tick)
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if result is None:
        raise _died(child.returncode, said)
    if "error" in result:
        raise BuildError(result["error"]["what"], found=result["error"]["found"], do=result["error"]["do"])
    return dict(result["done"])


def _followed(child: subprocess.Popen[str], tick: Callable[[str, int, int], None]) -> dict[str, Any] | None:
    """The child's last word, or None if it died without one."""
    assert child.stdout is not None
    result = None
    for text in child.stdout:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # something a library printed
        if "phase" in line:
            tick(line["phase"], line["step"], line["steps"])
        else:
            result = line
    child.wait()
    return result


def _died(code: int, said: list[str]) -> BuildError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    do = "build again; if it fails again, try another dtype" if code != -signal.SIGKILL else "free memory, or lower --max-build-memory"
    return BuildError("the process that built the engine died", found="; ".join([name, *said[-2:]]), do=do)


def _root() -> str:
    """The folder that holds the package `twotower`."""
    package = sys.modules["twotower"].__file__
    assert package is not None
    return str(Path(package).parent.parent)
