"""The embedded runtime: two engines and one block-diffusion loop, with numpy and one inference library."""

from twotower.config import GenerationConfig
from twotower.runtime.loop import StepRecord
from twotower.runtime.results import BlockEvent, Generation, Timings, Usage
from twotower.runtime.session import Request, SessionOptions, TwoTower

__all__ = ["BlockEvent", "Generation", "GenerationConfig", "Request", "SessionOptions", "StepRecord", "Timings", "TwoTower", "Usage"]
