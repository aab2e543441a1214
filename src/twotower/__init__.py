"""Nemotron-Labs-TwoTower: from a checkpoint to ONNX graphs, engines and a runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twotower.config import GenerationConfig
    from twotower.runtime import TwoTower

__all__ = ["GenerationConfig", "TwoTower", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Lazy names: importing `twotower` for its version costs nothing."""
    if name == "GenerationConfig":
        from twotower.config import GenerationConfig

        return GenerationConfig
    if name == "TwoTower":
        from twotower.runtime import TwoTower

        return TwoTower
    raise AttributeError(f"module 'twotower' has no attribute {name!r}")
