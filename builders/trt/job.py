"""Runs `twotower.builders.trt.child` for one engine and reads what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower.errors import BuildAbortedError, BuildError

__all__ = ["CrashedError", "RefusedError", "run_job"]


class RefusedError(BuildError):
    """The library does not make an engine of this graph.

    Attributes:
        log: What it said: lines as `BuildLog.to_json` writes them, or text on stderr.
    """

    log: tuple[Any, ...] = ()


class CrashedError(RefusedError, BuildAbortedError):
    """The library crashed over a graph: it is kept like one that was refused, but may yet build."""


def run_job(
    job: dict[str, Any], scratch: Path, *, tick: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Builds one engine in a child process, which dies with this call.

    Args:
        job: What to build; see `child.main`.
        scratch: A folder for the job's file.
        tick: Called with (phase, step, steps).

    Returns:
        What the build observed.

    Raises:
        RefusedError: the library refused the graph, or crashed over it (`CrashedError`).
        BuildAbortedError: there was no memory or no space for it.
    """
    job = {**job, "parent": os.getpid()}
    file = scratch / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    # The package is found where this very file was found, whatever the child's working directory.
    paths = os.pathsep.join(filter(None, (_root(), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "twotower.builders.trt.child", str(file)]
    with (scratch / "stderr.txt").open("w+b") as errors:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            result = _followed(child, tick)
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if "error" in result:
        parts = result["error"]
        error = RefusedError if result["refused"] else BuildAbortedError
        raise _with_log(error(parts["what"], found=parts["found"], do=parts["do"]), result["log"])
    if "done" not in result:
        raise _died(child.returncode, said)
    died = {"why_not": "; ".join(["the process died while it looked", *said[-1:]])}
    return {**result["done"], "inspector": result.get("inspected", died)}


def _followed(
    child: subprocess.Popen[str], tick: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """What the child said in the end, all its lines as one; empty if it died without a word."""
    assert child.stdout is not None
    result: dict[str, Any] = {}
    for text in child.stdout:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # something a library printed
        if not isinstance(line, dict):
            continue
        if "phase" in line:
            tick(line["phase"], line["step"], line["steps"])
        else:
            result |= line
    child.wait()
    return result


def _died(code: int, said: list[str]) -> BuildError:
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    what, found = "the process that built the engine died", "; ".join([name, *said[-2:]])
    if code == -signal.SIGKILL:
        do = "free memory; a lower --max-build-memory cuts towers whose engines hold weights"
        return BuildAbortedError(what, found=f"{found}: most likely for want of memory", do=do)
    if code >= 0:  # not the library: an exception of ours
        return BuildAbortedError(
            what, found=found, do="this is a defect of twotower: report it with what --debug shows"
        )
    return _with_log(
        CrashedError(what, found=found, do="build again; if it fails again, try another dtype"),
        said,
    )


def _with_log(error: BuildError, log: list[Any]) -> BuildError:
    if isinstance(error, RefusedError):
        error.log = tuple(log)
    return error


def _root() -> str:
    """The folder that holds the package `twotower`."""
    package = sys.modules["twotower"].__file__
    assert package is not None
    return str(Path(package).parent.parent)
