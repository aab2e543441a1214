"""What is to be loaded where, how, and what that took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twotower.bundle import FileRecord
from twotower.runtime.weights.transfer import Ring
from twotower.weights.refs import WeightRef

__all__ = ["LoadOptions", "LoadRequest", "Loaded"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Weights that a device needs.

    Attributes:
        file: The data file.
        record: Its size and SHA-256, as the bundle has them.
        weights: Those that are needed, by name, as `Bundle.weights` has them. What is there
            already, or is asked for by several engines, is read once.
        device: Where.
    """

    file: Path
    record: FileRecord
    weights: Mapping[str, WeightRef]
    device: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading took.

    Attributes:
        nbytes: Bytes read from files.
        seconds: From the first allocation to the last byte on its device.
    """

    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second; 0 where there was nothing to read."""
        return self.nbytes / self.seconds if self.seconds and self.nbytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Options of loading.

    Attributes:
        ring: Threads and pinned memory.
        direct: Whether what is not in the page cache is read past it: that spares a copy and does
            not drop what other programs have there.
    """

    ring: Ring = field(default_factory=Ring)
    direct: bool = True
