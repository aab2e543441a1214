"""One engine in a process of its own: its memory goes back to the system, and a crash of the compiler is an error and not the end.

    python -m twotower.builders.child JOB

JOB is a file written by `run_job`. Progress and the result are lines of JSON on stdout.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from twotower.builders import builder_for
from twotower.builders.network import BuildLog, NetworkOptions, build_network
from twotower.builders.tensorrt_builder import TensorRTBuilder
from twotower.bundle import Profile
from twotower.errors import TwoTowerError
from twotower.spec import TensorSpec

__all__ = ["main"]


def main(job_file: str) -> int:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    builder = builder_for(job["target"])
    assert isinstance(builder, TensorRTBuilder)
    log, started = BuildLog(), time.perf_counter()

    def tick(phase: str, step: int, steps: int) -> bool:
        try:
            _say({"phase": phase, "step": step, "steps": steps})
        except BrokenPipeError:
            return False  # whoever wanted the engine is gone
        return True

    options = NetworkOptions(
        inputs=tuple(TensorSpec(name, dtype, tuple(axes)) for name, dtype, axes in job["inputs"]),
        profiles=tuple(Profile(p["name"], {k: (v[0], v[1], v[2]) for k, v in p["axes"].items()}) for p in job["profiles"]),
        sms=tuple(job["sms"]),
        dtype=job["dtype"],
        timing_cache=Path(job["timing_cache"]) if job["timing_cache"] else None,
    )
    try:
        plan, facts = build_network(builder.flavour, (Path(job["graph"]).read_bytes(), Path(job["beside"])), options, log=log, tick=tick)
        with Path(job["output"]).open("wb") as file:
            file.write(plan)
    except TwoTowerError as e:
        _say({"error": {"what": e.what, "found": e.found, "do": e.do}})
        return 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.perf_counter() - started, 2)
    _say({"done": {**facts, "seconds": seconds, "peak_memory": peak, "log": log.to_json()}})
    return 0


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
