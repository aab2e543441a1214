"""A model in numbers (layers, parameters, bytes, state), from config and headers alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from twotower.checkpoint.layout import Role, Tower, expected_tensors
from twotower.checkpoint.shard import Tensor
from twotower.config import LayerKind, ModelConfig
from twotower.dtypes import item_bytes
from twotower.spec import TensorSpec, state_tensors
from twotower.units import format_bytes


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model in numbers; parameters and bytes are of both towers.

    `layers` are of one tower by kind. `active` counts the weights one token uses in one tower: the
    chosen experts of each MoE layer, one row of the embedding, everything else whole. Bytes are as
    stored, or all in `dtype` where nothing is stored. A row keeps `kv_bytes_per_token` for each
    token of its text and `state_bytes_per_row` (convolution and SSM) whatever its length.
    """

    pattern: str
    layers: dict[str, int]
    parameters: int
    by_tower: dict[str, int]
    by_role: dict[str, int]
    routed: int
    active: int
    active_ratio: float
    weight_bytes: int
    bytes_by_dtype: dict[str, int]
    bytes_by_role: dict[str, int]
    dtype: str
    kv_bytes_per_token: int
    state_bytes_per_row: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as aligned text."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.layers.items())
        share = f"{100 * self.routed / self.parameters:.1f} % in routed experts"
        used = "the chosen experts, one embedding row, all the rest"
        rows = [
            ("towers", f"2 of {len(self.pattern)} layers each: {kinds}"),
            ("pattern", self.pattern),
            ("parameters", f"{_count(self.parameters)} total, {share}"),
            *(("", f"{_count(n)} {name}") for name, n in self.by_tower.items()),
            ("active", f"{_count(self.active)} a token in one tower"),
            ("", f"{100 * self.active_ratio:.1f} % of a tower: {used}"),
            ("weights", f"{format_bytes(self.weight_bytes)} as {', '.join(self.bytes_by_dtype)}"),
        ]
        for role, count in sorted(
            self.by_role.items(),
            key=lambda item: item[1],
            reverse=True,
        ):
            part, size = 100 * count / self.parameters, format_bytes(self.bytes_by_role[role])
            rows.append(("", f"{role:<14}{_count(count):>8}  {part:5.1f} %  {size:>10}"))
        token, row = format_bytes(self.kv_bytes_per_token), format_bytes(self.state_bytes_per_row)
        state = f"{token} a token and {row} a row as {self.dtype} (SSM as float32)"
        return [f"{name:<12}{value}" for name, value in [*rows, ("state", state)]]


def summarize(
    config: ModelConfig, dtype: str | None = None, tensors: Mapping[str, Tensor] | None = None
) -> ModelSummary:
    """The numbers of a model.

    `dtype` is of the state, and of the weights unless `tensors` of an opened checkpoint, whose
    dtypes may differ, are given; None for the config's own.
    """
    kept = dtype or config.dtype
    by_tower: Counter[str] = Counter()
    by_role: Counter[str] = Counter()
    bytes_by_dtype: Counter[str] = Counter()
    bytes_by_role: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for name, tensor in expected_tensors(config).items():
        role, size = tensor.role.value, math.prod(tensor.shape)
        stored_as = tensors[name].dtype if tensors else kept
        nbytes = size * item_bytes(stored_as)
        by_tower[tensor.tower.value] += size
        by_role[role] += size
        bytes_by_dtype[stored_as] += nbytes
        bytes_by_role[role] += nbytes
        if tensor.tower is Tower.CONTEXT:
            used[role] += tensor.shape[1] if tensor.role is Role.EMBEDDING else size
    active = used.total()
    routed = used[Role.ROUTED_EXPERT.value]
    if routed:  # whole experts are chosen, all of one size: the division leaves nothing over
        active += routed * config.num_experts_per_tok // config.n_routed_experts - routed
    state = state_tensors(config, kept)
    layers = {kind.name.lower(): len(config.indices(kind)) for kind in LayerKind}
    return ModelSummary(
        pattern=config.pattern,
        layers={kind: count for kind, count in layers.items() if count},
        parameters=by_tower.total(),
        by_tower=dict(by_tower),
        by_role=dict(by_role),
        routed=by_role[Role.ROUTED_EXPERT.value],
        active=active,
        active_ratio=active / by_tower[Tower.CONTEXT.value],
        weight_bytes=bytes_by_dtype.total(),
        bytes_by_dtype=dict(bytes_by_dtype),
        bytes_by_role=dict(bytes_by_role),
        dtype=kept,
        kv_bytes_per_token=sum(_bytes(s.past) for s in state if s.in_place),
        state_bytes_per_row=sum(_bytes(s.past) for s in state if not s.in_place),
    )


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape({"B": 1, "T": 1})) * item_bytes(spec.dtype)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
