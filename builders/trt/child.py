"""One engine in a process of its own: its memory is given back, and a crash is only an error.

    python -m twotower.builders.trt.child JOB

JOB is a file written by `run_job`. Progress and the result are lines of JSON on stdout.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from twotower.builders import builder_for
from twotower.builders.trt.engine_inspector import inspect_plan
from twotower.builders.trt.network import BuildLog, NetworkOptions, build_network
from twotower.builders.trt.tensorrt_builder import TensorRTBuilder
from twotower.errors import BuildError, TwoTowerError
from twotower.hardware import probe_machine
from twotower.records import decode
from twotower.units import format_bytes

_PR_SET_PDEATHSIG = 1


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    _die_with(job["parent"])
    builder = builder_for(job["target"])
    assert isinstance(builder, TensorRTBuilder)
    log = BuildLog()
    try:
        graph = (Path(job["graph"]).read_bytes(), Path(job["beside"]))
        timings = Path(job["timing_cache"]) if job["timing_cache"] else None
        options = decode(NetworkOptions, job, strict=False, timing_cache=timings)
        plan, facts = build_network(builder.variant, graph, options, log=log, tick=_tick)
        _write(Path(job["output"]), plan)
    except TwoTowerError as e:
        error = {"what": e.what, "found": e.found, "do": e.do}
        refused = not isinstance(e.__cause__, OSError)
        _say({"error": error, "refused": refused, "log": log.to_json()})
        return 2
    facts |= {
        "bytes": plan.nbytes,
        "peak_memory": _peak_memory(),
        "log": log.to_json(),
    }
    _say({"done": facts})
    # The engine is written and reported: whatever the inspector does now cannot lose it.
    profiles = len(job["profiles"])
    _say({"inspected": inspect_plan(builder.variant, plan, probe_machine(), profiles=profiles)})
    return 0


def _write(output: Path, plan: Any) -> None:
    """Writes the library's buffer without copying gigabytes; BuildError if it cannot be written."""
    try:
        with output.open("wb", buffering=0) as file:
            rest = memoryview(plan)
            while rest.nbytes:  # one call writes 2 GiB at most
                rest = rest[file.write(rest) :]
    except OSError as e:
        raise BuildError(
            f"the engine of {format_bytes(plan.nbytes)} could not be written to '{output}'",
            found=str(e),
            do="free disk space or check permissions, then build again; "
            "engines that were finished are kept in the cache",
        ) from e


def _peak_memory() -> int:
    """Peak memory of this process in bytes. Linux's `ru_maxrss` starts at the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tick(phase: str, step: int, steps: int) -> bool:
    try:
        _say({"phase": phase, "step": step, "steps": steps})
    except BrokenPipeError:
        return False  # whoever wanted the engine is gone
    return True


def _die_with(parent: int) -> None:
    """Lets no build outlive its parent; outside of Linux the closed pipe ends it a step later."""
    # Ctrl-C reaches the whole group; the parent ends its child itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was set
            os._exit(1)


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
