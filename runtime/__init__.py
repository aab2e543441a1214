"""Two engines and one block loop: generation from a bundle, without torch."""

from twotower.config import GenerationConfig
from twotower.errors import RequestCancelledError
from twotower.runtime.requests import Request
from twotower.runtime.results import (
    BlockEvent,
    Generation,
    StepRecord,
    Timings,
    Usage,
)
from twotower.runtime.scoring import Score
from twotower.runtime.session import TwoTower

__all__ = [
    "BlockEvent",
    "Generation",
    "GenerationConfig",
    "Request",
    "RequestCancelledError",
    "Score",
    "StepRecord",
    "Timings",
    "TwoTower",
    "Usage",
]
