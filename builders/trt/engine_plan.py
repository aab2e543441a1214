"""One engine to be built, with everything its build needs and the key it is known by: nothing here touches a library."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.builders.build_cost import build_memory, program_bytes
from twotower.builders.cache_keys import EngineIdentity, GpuIdentity, engine_key
from twotower.bundle import EngineFile, ExpertsStep

if TYPE_CHECKING:
    from twotower.builders.weight_inputs import WeightPlaces

__all__ = ["EnginePlan", "plan_key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine.

    Attributes:
        graph: `context`, `context_head` or `denoiser`.
        engine: Its file, layers, inputs, outputs and profiles.
        model: The serialized graph the library is given.
        beside: A file in the folder the graph's weights lie in.
        places: Which of its weights are inputs and which it holds.
        key: Its name in the cache.
        job: What `child.main` is told, but for the places of its files.
        notes: What the graph rules note of the graph.
        operators: How often each operator is in it, the most frequent first.
        experts: The experts that run after it.
    """

    graph: str
    engine: EngineFile
    model: bytes
    beside: Path
    places: WeightPlaces
    key: str
    job: dict[str, Any]
    notes: tuple[dict[str, str], ...] = ()
    operators: dict[str, int] = field(default_factory=dict)
    experts: ExpertsStep | None = None

    @property
    def build_memory(self) -> int:
        """Bytes of memory its build needs at its peak."""
        first, end = self.engine.layers
        return build_memory(
            self.places.inside_bytes, end - first, largest_packed=self.places.largest_packed
        )

    @property
    def nbytes(self) -> int:
        """Bytes it takes on disk."""
        first, end = self.engine.layers
        return self.places.inside_bytes * 101 // 100 + program_bytes(self.graph, end - first)


def plan_key(
    job: dict[str, Any],
    model: bytes,
    *,
    holds: str,
    library: dict[str, str],
    gpu: GpuIdentity | None,
) -> str:
    """The key of the engine a job makes; see `cache_keys`. `holds` is SHA-256 of the weights it holds some of, or empty."""
    identity = EngineIdentity(
        graph=hashlib.sha256(model).hexdigest(),
        holds=holds,
        library=library,
        dtype=job["dtype"],
        inputs=job["inputs"],
        profiles=job["profiles"],
        sms=tuple(job["sms"]),
        gpu=gpu,
    )
    return engine_key(identity)
