"""What a model is, in numbers: layers, parameters, bytes, state. From the config and the headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from twotower.config import LayerKind, ModelConfig
from twotower.config.tensors import Role, Tower, expected_tensors
from twotower.spec import TensorSpec, state_tensors

__all__ = ["ModelSummary", "summarize"]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in numbers.

    Attributes:
        pattern: The layers as letters.
        layers: Layers of one tower by kind.
        parameters: All weights of both towers.
        by_tower: Weights of each tower.
        by_role: Weights of both towers by what they are for.
        routed: Weights of routed experts.
        active: Weights one token uses in one tower: the chosen experts of each MoE layer, one row of the embedding, everything else whole.
        weight_bytes: Size of all weights in `dtype`.
        dtype: Element type the byte figures are for.
        kv_bytes_per_token: Keys and values a row keeps for each token of its text.
        state_bytes_per_row: Convolution and SSM state of a row, whatever its length.
    """

    pattern: str
    layers: dict[str, int]
    parameters: int
    by_tower: dict[str, int]
    by_role: dict[str, int]
    routed: int
    active: int
    weight_bytes: int
    dtype: str
    kv_bytes_per_token: int
    state_bytes_per_row: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as aligned text."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.layers.items())
        rows = [
            ("towers", f"2 of {len(self.pattern)} layers each: {kinds}"),
            ("pattern", self.pattern),
            ("parameters", f"{_count(self.parameters)} total, {100 * self.routed / self.parameters:.1f} % in routed experts"),
            *(("", f"{_count(n)} {name}") for name, n in self.by_tower.items()),
            ("active", f"{_count(self.active)} a token in one tower"),
            ("weights", f"{_size(self.weight_bytes)} as {self.dtype}"),
            ("state", f"{_size(self.kv_bytes_per_token)} a token and {_size(self.state_bytes_per_row)} a row as {self.dtype} (SSM as float32)"),
        ]
        return [f"{name:<12}{value}" for name, value in rows]


def summarize(config: ModelConfig, dtype: str | None = None) -> ModelSummary:
    """The numbers of a model in `dtype` (None for its own)."""
    kept = dtype or config.dtype
    by_tower: Counter[str] = Counter()
    by_role: Counter[str] = Counter()
    active = 0
    chosen = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0.0
    for tensor in expected_tensors(config).values():
        size = math.prod(tensor.shape)
        by_tower[tensor.tower.value] += size
        by_role[tensor.role.value] += size
        if tensor.tower is Tower.CONTEXT:
            active += round(size * chosen) if tensor.role is Role.ROUTED_EXPERT else tensor.shape[1] if tensor.role is Role.EMBEDDING else size
    state = state_tensors(config, kept)
    total = sum(by_tower.values())
    return ModelSummary(
        pattern=config.pattern,
        layers={kind.name.lower(): len(config.indices(kind)) for kind in LayerKind if config.indices(kind)},
        parameters=total,
        by_tower=dict(by_tower),
        by_role=dict(by_role),
        routed=by_role[Role.ROUTED_EXPERT.value],
        active=active,
        weight_bytes=total * (4 if kept == "float32" else 2),
        dtype=kept,
        kv_bytes_per_token=sum(_bytes(s.past) for s in state if s.in_place),
        state_bytes_per_row=sum(_bytes(s.past) for s in state if not s.in_place),
    )


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape({"B": 1, "T": 1})) * (4 if spec.dtype == "float32" else 2)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
