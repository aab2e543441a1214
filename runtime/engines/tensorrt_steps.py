"""A program of TensorRT ready to run, and whether a pass of such programs may be captured."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.errors import DeviceError
from twotower.runtime.cuda.streams import CudaStream
from twotower.runtime.engines.tensorrt_plan import Execution, Plan, PlanLoader
from twotower.spec import TensorSpec

__all__ = ["ProgramRun", "may_be_captured"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """A program ready to run; see `RunningProgram`.

    Attributes:
        execution: Its context.
        index: Its number in its tower.
        takes: What it takes over from the programs and experts before it, in bytes by name.
        loader: Where the library's words are.
    """

    execution: Execution
    index: int
    takes: Mapping[str, int]
    loader: PlanLoader

    @property
    def plan(self) -> Plan:
        return self.execution.plan

    @property
    def context(self) -> Any:
        return self.execution.context

    @property
    def device(self) -> int:
        return self.plan.device

    @property
    def writes(self) -> Sequence[TensorSpec]:
        return self.plan.part.outputs

    def enqueue(self, stream: int) -> None:
        """Puts it on a stream of its device, which is current.

        Raises:
            DeviceError: the library refuses.
        """
        if not self.context.execute_async_v3(stream):
            said = self.loader.drain()
            raise DeviceError(
                f"{self.plan.part.file} was not run",
                found="the library refused to enqueue it" + (f": {said}" if said else ""),
                do="run `twotower doctor BUNDLE`; an engine that was built for another GPU fails like this",
            )

    def close(self) -> None:
        """Frees the context; idempotent."""
        self.execution.close()


def may_be_captured(
    programs: Iterable[ProgramRun],
    queue: CudaStream,
    loader: PlanLoader,
    *,
    refused: set[str],
) -> bool:
    """What the library says of a pass, if it does; a refusal is logged once an engine.

    Args:
        programs: Of the pass.
        queue: It would be captured on.
        loader: The library.
        refused: Engines whose refusal was logged; one more is added.
    """
    if not loader.flavour.capturable:
        return True
    for bound in programs:
        loader.drain()
        if not bound.context.is_stream_capturable(queue.handles[bound.device]):
            file, words = bound.plan.part.file, loader.drain() or "it gives no reason"
            if file not in refused:
                what = "%s cannot be captured and is launched piece by piece: %s"
                logger.warning(what, file, words)
            refused.add(file)
            return False
    return True
