"""The engines of a graph, each loaded once on its device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from twotower.bundle import EngineFile, EngineRecord, ExpertsStep
from twotower.runtime.cuda.calls import Cuda
from twotower.runtime.engines.tensorrt_plan import Plan, PlanLoader

__all__ = ["load_steps"]

logger = logging.getLogger(__name__)


def load_steps(
    record: EngineRecord, name: str, devices: Sequence[int], *, loader: PlanLoader, folder: Path, cuda: Cuda
) -> list[Plan | ExpertsStep]:
    """The steps of a graph with every engine on its device, each file once a device."""
    out: list[Plan | ExpertsStep] = []
    known: dict[tuple[str, int], Plan] = {}
    places = iter(devices)
    for step in record.steps[name]:
        if not isinstance(step, EngineFile):
            out.append(step)
            continue
        device, file = next(places), folder / step.file
        cuda.use(device)
        if (step.file, device) in known:
            out.append(loader.another(known[step.file, device], step, file))
            continue
        before = cuda.free_memory()[0]
        plan = loader.load(file, step, device)
        taken, size = before - cuda.free_memory()[0], record.files[step.file].size
        logger.info("%s, %d bytes, took %d bytes of GPU %d", step.file, size, taken, device)
        known[step.file, device] = plan
        out.append(plan)
    return out
