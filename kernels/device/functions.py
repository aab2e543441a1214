"""The kernels by the names their specifications use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.kernels.device.pairs import pairs_few, pairs_order, pairs_slots
from twotower.kernels.device.product import combine, down, up

__all__ = ["FUNCTIONS"]

FUNCTIONS: Mapping[str, Any] = {
    "pairs_few": pairs_few,
    "pairs_slots": pairs_slots,
    "pairs_order": pairs_order,
    "up": up,
    "down": down,
    "combine": combine,
}
"""Name -> the function Triton compiles."""
