"""Which kernels a pass is made of, by what the driver reports of them to torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.gpu.timing import need_torch
from twotower.doctor import Answers, SkipSectionError
from twotower.doctor.sections import short
from twotower.runtime.device import Event

__all__ = ["KernelTime", "kernel_times", "profiled"]

_RUNS = 3
_SHOWN = 20
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class KernelTime:
    """All launches of one name: how many a pass, and microseconds of a pass."""

    name: str
    launches: float
    us: float


def profiled(answers: Answers, run: Callable[[], Event], *, name: str) -> None:
    """Profiles some runs of a pass; adds a table of its slowest kernels, and prints all of them.

    A profiler that does not work here is an answer, too, and no error.
    """
    try:
        torch = need_torch()
        times = kernel_times(_traced(torch, run), runs=_RUNS)
    except (SkipSectionError, RuntimeError, OSError, ValueError) as e:
        answers.put(profiles={**answers.get("profiles", {}), name: f"none: {e}"})
        return
    total = sum(t.us for t in times)
    print(f"-- {name}: {total:.1f} us a pass")
    for t in times:
        print(f"{t.us:10.1f} us {t.launches:6.1f} x {t.name}")
    facts = {"kernels": sum(t.launches for t in times), "us": short(total)}
    answers.put(profiles={**answers.get("profiles", {}), name: facts})
    rows = [
        (t.name[:100], short(t.launches), short(t.us), _share(t.us, total)) for t in times[:_SHOWN]
    ]
    title = f"Kernels of {name}: {facts['kernels']:g} launches, {facts['us']:g} us"
    answers.table(title, ("kernel", "launches", "us a pass", "share"), rows)


def kernel_times(events: Iterable[dict[str, Any]], *, runs: int) -> list[KernelTime]:
    """What ran on the device, by name, the slowest first.

    Args:
        events: A trace in Chrome's format; `dur` is in microseconds.
        runs: Passes that were traced.
    """
    sums: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("cat") in _KINDS:
            count, us = sums.get(event["name"], (0, 0.0))
            sums[event["name"]] = count + 1, us + float(event["dur"])
    times = [KernelTime(name, count / runs, us / runs) for name, (count, us) in sums.items()]
    return sorted(times, key=lambda t: -t.us)


def _traced(torch: Any, run: Callable[[], Event]) -> list[dict[str, Any]]:
    run().wait_done()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_RUNS):
            run().wait_done()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return list(json.loads(file.read_text(encoding="utf-8"))["traceEvents"])


def _share(us: float, total: float) -> str:
    return f"{100 * us / total:.1f} %"
