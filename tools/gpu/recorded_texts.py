"""The recorded texts of the fixtures, and how they were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower import GenerationConfig

__all__ = ["AUTOREGRESSIVE", "FIXTURES", "ROOT", "recorded_options", "recorded_texts"]

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"

AUTOREGRESSIVE = GenerationConfig(mode="ar", max_new_tokens=24, ignore_eos=True)
"""How the recorded text of the context tower alone was written."""


def recorded_texts(fixture: str) -> list[dict[str, Any]]:
    """Prompts of a fixture with the tokens that independent code computed, and its parameters."""
    return list(json.loads((FIXTURES / fixture / "golden.json").read_text(encoding="utf-8")))


def recorded_options(text: dict[str, Any]) -> GenerationConfig:
    """How a recorded text was written; the reference knows no end of sequence."""
    names = (
        "max_new_tokens",
        "block_size",
        "steps_per_block",
        "confidence_threshold",
        "temperature",
    )
    return GenerationConfig(**{name: text["params"][name] for name in names}, ignore_eos=True)
