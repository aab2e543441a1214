"""What identifies an engine, so that one that was built before is recognised: plain data to a name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SETTINGS", "EngineIdentity", "GpuIdentity", "engine_key"]

_SCHEMA = 2

SETTINGS: dict[str, Any] = {
    "cleared_flags": ["TF32"],  # float32 means float32
    "set_flags": ["REQUIRE_USER_ALLOCATION"],  # where the library has it: capture needs it
    "max_aux_streams": 0,  # one stream a pass: more cost hundreds of events and gain no bandwidth
    "profiling_verbosity": "DETAILED",
    "decomposable_attention": [
        "float32"
    ],  # no fused kernel computes attention in these types: it may be taken apart
}
"""How the library is configured besides what an `EngineIdentity` says. The build reads it from here, so that a change changes every key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """The GPU an engine is tuned for where the library builds for the one at hand."""

    name: str
    sm: int
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """Everything that decides what a build makes. Names and places of files do not, and are not here.

    Attributes:
        graph: SHA-256 of the graph the library is given, its axes already fixed and its layers
            already cut.
        holds: SHA-256 of the file its weights lie in if it holds some of them; empty for a program
            that serves any checkpoint.
        library: Name and version.
        dtype: The graph's own element type.
        inputs: Name, type and axes of each, as `TensorSpec.to_json` writes them.
        profiles: In order, as `EngineFile.to_json` writes them.
        sms: Compute capabilities built for ahead of time.
        gpu: The GPU at hand; None ahead of time.
    """

    graph: str
    holds: str
    library: Mapping[str, str]
    dtype: str
    inputs: list[Any]
    profiles: list[Any]
    sms: tuple[int, ...] = ()
    gpu: GpuIdentity | None = None


def engine_key(identity: EngineIdentity) -> str:
    """The name of an engine in the cache: 32 hexadecimal digits."""
    text = json.dumps(
        {"schema": _SCHEMA, "settings": SETTINGS, **asdict(identity)},
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]
