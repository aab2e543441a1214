"""The denoiser's small arrays: allocated once for a number of rows, filled in place, bound once."""

from __future__ import annotations

from twotower.runtime.memory import Memory
from twotower.spec import (
    BLOCK,
    COMMIT_FLOOR,
    CONFIDENCE,
    CONTEXT_LENGTH,
    MASKED_LEFT,
    NEXT_BLOCK,
    NOISE,
    PREDICTED,
    TEMPERATURE,
    THRESHOLD,
    TowerSignature,
)

__all__ = ["DenoiserArrays"]

_DENOISER_SMALL = (
    *(BLOCK, CONTEXT_LENGTH, THRESHOLD, COMMIT_FLOOR, TEMPERATURE, NOISE),
    *(NEXT_BLOCK, PREDICTED, CONFIDENCE, MASKED_LEFT),
)


class DenoiserArrays:
    """The denoiser's small inputs and outputs, written and read in place (shapes as in the graph contract).

    Attributes:
        by_name: The buffers behind them under their graph names. They may have more rows than the arrays show.
    """

    __slots__ = (
        "_whole",
        "block",
        "by_name",
        "commit_floor",
        "confidence",
        "context_length",
        "masked_left",
        "next_block",
        "noise",
        "predicted",
        "temperature",
        "threshold",
    )

    def __init__(self, memory: Memory, signature: TowerSignature, *, rows: int, block_size: int) -> None:
        self.by_name = memory.small([signature.tensor(name) for name in _DENOISER_SMALL], {"B": rows, "S": block_size})
        self._whole = {name: memory.host(buffer) for name, buffer in self.by_name.items()}
        self.use(rows, unmasked=0)

    def use(self, rows: int, *, unmasked: int) -> None:
        """Shows the first rows; the others become padding: a block without masks after no text, nothing to commit.

        Args:
            rows: How many.
            unmasked: A token that is no mask.
        """
        for name, whole in self._whole.items():
            whole[rows:] = unmasked if name == BLOCK else 0
        a = {name: whole[:rows] for name, whole in self._whole.items()}
        self.block, self.context_length = a[BLOCK], a[CONTEXT_LENGTH]
        self.threshold, self.commit_floor = a[THRESHOLD], a[COMMIT_FLOOR]
        self.temperature, self.noise = a[TEMPERATURE], a[NOISE]
        self.next_block, self.predicted = a[NEXT_BLOCK], a[PREDICTED]
        self.confidence, self.masked_left = a[CONFIDENCE], a[MASKED_LEFT]
