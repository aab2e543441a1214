"""What is the same for every row of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from twotower.config import ModelConfig
from twotower.runtime.hooks import Hooks
from twotower.runtime.streams import Streams

__all__ = ["LoopSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """What the loop is given besides buffers and rows.

    Attributes:
        model: The model both towers compute.
        largest_capacity: Most positions the cache may grow to.
        streams: The towers' queues.
        hooks: The caller's callbacks.
    """

    model: ModelConfig
    largest_capacity: int
    streams: Streams = field(default_factory=Streams)
    hooks: Hooks = field(default_factory=Hooks)
