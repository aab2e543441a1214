"""The CUDA calls, with what became of captures."""

from __future__ import annotations

from typing import Any

from twotower.runtime.cuda.calls import Cuda

__all__ = ["CountedCuda"]


class CountedCuda(Cuda):
    """The calls, and how many captures were begun and graphs made of them.

    Args:
        api: See `Cuda`; likewise
        driver: the driver's functions.

    Attributes:
        begun: Captures that were begun.
        made: Graphs that were made.
    """

    def __init__(self, api: Any, *, driver: Any = None) -> None:
        super().__init__(api, driver=driver)
        self.begun = self.made = 0

    def begin_capture(self, stream: int) -> None:
        """Counts, and begins."""
        self.begun += 1
        super().begin_capture(stream)

    def instantiate(self, graph: int) -> int:
        """Makes the graph, and counts it."""
        made = super().instantiate(graph)
        self.made += 1
        return made
